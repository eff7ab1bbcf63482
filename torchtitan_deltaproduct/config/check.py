"""Judges a loaded config: options that are refused, out of range or read by nobody, and those that contradict another.

    problems = check(config, sources, Environment(world_size=8, cuda=True))

What one option alone decides stands in its record; a contradiction is an entry of `RULES`. What depends on the machine
is judged only as far as `Environment` knows it.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import ConfigError, nearest
from ..models import counts
from ..ops.triton_geometry import ROWS
from ..options import value_of
from .job import GENERATED, GROUP_WORD, LANGUAGE, PREPARED, STREAMING, JobConfig
from .problems import Problem, Source, quoted
from .schedule import Schedule
from .schema import schema
from .values import show


@dataclass(frozen=True)
class Environment:
    """What is known of the machine a config is to run on; None where it is not."""

    world_size: int | None = None
    """Ranks of the job."""
    cuda: bool | None = None
    """Whether the ranks have a CUDA device."""
    files: bool = False
    """Whether paths of the config can be looked up here."""

    @classmethod
    def detect(cls) -> "Environment":
        """This process: `WORLD_SIZE` as torchrun sets it (1 without; ConfigError if it is no number), and whether CUDA
        is present."""
        import torch

        ranks = os.environ.get("WORLD_SIZE", "1")
        if not ranks.isdecimal():
            raise ConfigError(f"WORLD_SIZE = {ranks!r}: expected the number of ranks, as torchrun sets it; or unset it")
        return cls(int(ranks), torch.cuda.is_available(), files=True)


def check(
    config: JobConfig,
    sources: Mapping[str, Source],
    environment: Environment,
    unusable: Collection[str] = (),
) -> list[Problem]:
    """Finds all that is wrong with the values of a config.

    Args:
        config: Values of the right types.
        sources: Where each value was given; keys not in it have their default.
        environment: What is known of the machine.
        unusable: Keys whose value could not be read: nothing that looks at them is judged.
    """
    problems, judged, given = [], set(unusable), []
    for key, option in schema().items():
        value, record, reason = value_of(config, key), option.record, None
        if key in judged or value == option.default:
            continue
        if record.refused:
            reason = f"{record.refused.reason}; {record.refused.instead}"
        elif value is not None and record.allowed and (wrong := record.allowed.refusal(value)):
            reason = f"{wrong}{quoted(option.summary)}"
        if reason:
            source = sources.get(key, Source())
            problems.append(Problem(f"{source.label(key, value)}: {reason}", source))
            judged.add(key)
        elif record.reader:
            given.append((key, record.reader))
    for key, reader in given:
        if judged.isdisjoint((key, reader.by)) and not reader.holds(config):
            reason = reader.otherwise.format(value_of(config, reader.by))
            problems.append(_contradiction(config, sources, (key, reader.by), reason))
    for names, judge in RULES:
        keys = names.split()
        if judged.isdisjoint(keys) and (reason := judge(config, environment)):
            problems.append(_contradiction(config, sources, keys, reason))
    return problems


def _contradiction(config: JobConfig, sources: Mapping[str, Source], keys: Collection[str], reason: str) -> Problem:
    """Blames the first of `keys` that the user set, and tells where the others come from."""
    blamed = next((key for key in keys if key in sources), next(iter(keys)))
    source = sources.get(blamed, Source(config.job.config_file or ""))
    others = []
    for key in keys:
        value = value_of(config, key)
        if key != blamed and (key in sources or value is not None):
            table, _, name = key.rpartition(".")
            others.append(f"[{table}] {name} = {show(value)}, {sources.get(key, 'default')}")
    context = f" (with {'; '.join(others)})" if others else ""
    return Problem(f"{source.label(blamed, value_of(config, blamed))}: {reason}{context}", source)


Judge = Callable[[JobConfig, Environment], Any]
"""What is wrong with a config in an environment, as the rest of a sentence that begins with the value; or nothing."""


def _lengths(c: JobConfig, e: Environment) -> str | None:
    low, high, room = c.data.min_length, c.data.max_length, c.training.seq_len
    if not LANGUAGE.holds(c):
        return None
    if high > room:
        return f"rows of max_length = {high} tokens do not fit in training.seq_len = {room}"
    return f"max_length = {high} is below min_length = {low}" if high < low else None


def _tested_lengths(c: JobConfig, e: Environment) -> str | None:
    lengths, low = c.validation.lengths, c.data.max_length
    if len(set(lengths)) < len(lengths):
        return "a length is listed twice"
    if LANGUAGE.holds(c) and lengths and min(lengths) < low:
        return f"length L has rows of max_length = {low} to L tokens: {min(lengths)} is too short"
    return None


def _warmup(c: JobConfig, e: Environment) -> str | None:
    schedule = Schedule.of(c.lr_scheduler, c.training.steps)
    total, decay = schedule.total_steps, schedule.decay_steps
    if schedule.warmup_steps > total:
        return (
            f"the warm-up does not fit in the schedule of {total} steps; shorten warmup_steps, or set "
            "[lr_scheduler] total_steps to follow the curve of a longer run"
        )
    if not schedule.fits:
        return f"warm-up and a decay of {decay} steps do not fit in the schedule of {total} steps"
    return None


def _global_batch(c: JobConfig, e: Environment) -> str | None:
    whole, local = c.training.global_batch_size, c.training.local_batch_size
    world = None if e.world_size is None else c.data_ranks(e.world_size)
    if whole == -1:
        return None
    if whole % local:
        return f"must be a multiple of local_batch_size = {local}"
    if world is None or whole % (local * world) == 0:
        return None
    step = local * world
    below = whole // step * step
    choices = f"{below} or {below + step}" if below else f"{step}"
    return f"must be a multiple of local_batch_size x {world} ranks = {step}; nearest: {choices}"


def _degrees(c: JobConfig, e: Environment) -> str | None:
    replicate, shard = c.parallelism.data_parallel_replicate_degree, c.parallelism.data_parallel_shard_degree
    context = c.parallelism.context_parallel_degree
    fixed = replicate * context
    if e.world_size is None or fixed * shard == e.world_size or (shard == -1 and e.world_size % fixed == 0):
        return None
    if shard == -1:
        sharing = f", each of them {context} ranks to a sequence" if context > 1 else ""
        return f"{e.world_size} ranks cannot be divided into {replicate} replicas{sharing}"
    product = "replicate x shard x context" if context > 1 else "replicate x shard"
    return f"{product} = {fixed * shard}, but the job has {e.world_size} ranks"


def _cut(key: str) -> tuple[str, Judge]:
    """Context parallelism: equal parts of whole chunks, each longer than what a convolution reads of the one before."""

    def judge(c: JobConfig, e: Environment) -> str | None:
        ranks, value = c.parallelism.context_parallel_degree, value_of(c, key)
        # Rows of a chunk go to whole tokens; where n is no power of two, a part of the last chunk stays empty.
        chunk = max(1, ROWS >> (c.model.num_householder - 1).bit_length())
        least = -(-max(chunk, c.model.conv_size - 1) // chunk) * chunk
        step = ranks * least
        for length in value if isinstance(value, list) else [value]:
            if ranks > 1 and length % step:
                below = length // step * step
                choices = f"{below:,} or {below + step:,}" if below else f"{step:,}"
                return (
                    f"{length:,} tokens cannot be cut for {ranks} ranks: a multiple of {ranks} x {least} tokens "
                    f"(whole chunks) is needed; nearest: {choices}"
                )
        return None

    return f"{key} parallelism.context_parallel_degree", judge


def _repeated(key: str, instead: str) -> tuple[str, Judge]:
    def judge(c: JobConfig, e: Environment) -> str | None:
        paths = value_of(c, key)
        repeated = {path for path in paths if paths.count(path) > 1}
        return f"{show(min(repeated))} is listed twice; {instead}" if repeated else None

    return key, judge


def _backend(c: JobConfig, e: Environment) -> str | None:
    if not c.compile.enable or c.compile.backend == "inductor":
        return None
    # Loads the compiler, which is slow.
    from torch.compiler import list_backends

    known = list_backends(exclude_tags=())
    if c.compile.backend in known:
        return None
    near = nearest(c.compile.backend, known)
    return "torch has no such backend; " + (f"nearest: {near!r}" if near else f"it has {', '.join(known)}")


def _profile_cycle(c: JobConfig, e: Environment) -> str | None:
    cycle = c.profiling.profiler_warmup + c.profiling.profiler_active
    too_short = c.profiling.enable_profiling and cycle > c.profiling.profile_freq
    return f"shorter than one cycle of {cycle} steps, profiler_warmup + profiler_active" if too_short else None


def _best(c: JobConfig, e: Environment) -> str | None:
    saved, validated = c.checkpoint.interval, c.validation.freq
    if not c.checkpoint.keep_best or saved % validated == 0 or validated % saved == 0:
        return None
    return f"few saved steps would be validated: one of interval = {saved} and freq = {validated} must divide the other"


def _run_folder(c: JobConfig, e: Environment) -> str | None:
    path = Path(c.job.dump_folder).absolute()
    lowest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    return f"{lowest} is no folder, so there cannot be one" if e.files and not lowest.is_dir() else None


def graph_obstacle(c: JobConfig, e: Environment) -> str | None:
    """Why a micro-batch cannot be one CUDA graph, by what is known of the machine."""
    if e.cuda is False:
        return "there is no CUDA"
    if (e.world_size or 1) > 1:
        return f"there are {e.world_size} ranks"
    if c.activation_checkpoint.mode in ("selective", "full"):
        return f'activation_checkpoint.mode is "{c.activation_checkpoint.mode}"'
    if c.training.enable_cpu_offload:
        return "weights are offloaded"
    return "fla chooses kernels while it runs" if c.model.op_backend == "fla" else None


MAX_PARAMETERS = 10**13
"""Of a model; more is a slip in a size, and would end in an allocator's error."""


def _needs_cuda(key: str, setting: Any, what: str) -> tuple[str, Judge]:
    text = f"{what} needs CUDA, and there is none"
    return key, lambda c, e: e.cuda is False and value_of(c, key) == setting and text


RULES: list[tuple[str, Judge]] = [
    ("model.hidden_size model.vocab_size model.num_hidden_layers model.num_heads model.head_dim model.expand_v "
     "model.num_householder model.intermediate_size model.conv_size",
     lambda c, e: (numbers := counts.total_parameters(c.model)) > MAX_PARAMETERS
     and f"makes a model of {numbers:.1e} parameters, of {MAX_PARAMETERS:.0e} at most: a size with digits too many?"),
    ("model.expand_v model.head_dim", lambda c, e: not c.model.has_whole_values
     and f"head_dim * expand_v must be a whole number of at least 1, not {c.model.head_dim * c.model.expand_v:g}"),
    ("model.op_backend", lambda c, e: c.model.op_backend in ("triton", "fla") and e.cuda is False
     and f'{c.model.op_backend} runs on CUDA only, and there is none; "auto" picks a backend that runs here'),
    ("model.op_backend training.mixed_precision_param",
     lambda c, e: c.model.op_backend == "fla" and c.training.mixed_precision_param == "float32"
     and "fla computes in bfloat16 or float16 only"),
    ("data.paths", lambda c, e: PREPARED.holds(c) and not c.data.paths
     and "no data to train on; make some with python -m torchtitan_deltaproduct.data.prepare"),
    ("data.kind data.dataset", lambda c, e: STREAMING.holds(c) and not c.data.dataset
     and "streaming needs [data] dataset"),
    ("data.group data.kind", lambda c, e: GROUP_WORD.holds(c) and not c.data.group
     and 'group_word needs [data] group, such as "S3" or "A4_x_Z5"'),
    ("data.curriculum_start data.curriculum_steps training.seq_len",
     lambda c, e: bool(c.data.curriculum_start) != bool(c.data.curriculum_steps)
     and "a curriculum needs both curriculum_start (tokens) and curriculum_steps"),
    ("data.curriculum_start data.curriculum_steps training.seq_len",
     lambda c, e: c.data.curriculum_steps and c.data.curriculum_start > c.training.seq_len
     and f"starts above training.seq_len = {c.training.seq_len}, the length it leads to"),
    ("data.max_length data.min_length training.seq_len", _lengths),
    ("validation.lengths data.max_length", _tested_lengths),
    ("data.weights data.paths", lambda c, e: c.data.weights and len(c.data.weights) != len(c.data.paths)
     and f"{len(c.data.weights)} weights for {len(c.data.paths)} paths; give one for each, or none"),
    _repeated("data.paths", "give it a larger weight instead"),
    _repeated("validation.paths", "its windows would count twice"),
    ("validation.enable validation.paths data.kind", lambda c, e: GENERATED.holds(c) and c.validation.paths
     and "generated data is validated on generated samples"),
    ("validation.enable validation.paths data.kind",
     lambda c, e: c.validation.enable and not c.validation.paths and not GENERATED.holds(c)
     and "there is nothing to validate on"),
    ("validation.prompts validation.enable", lambda c, e: c.validation.prompts and not c.validation.enable
     and "samples are drawn at each validation, and there is none"),
    ("lr_scheduler.decay_steps lr_scheduler.decay_ratio",
     lambda c, e: c.lr_scheduler.decay_steps is not None and c.lr_scheduler.decay_ratio is not None
     and "two lengths of the decay; give one"),
    ("lr_scheduler.warmup_steps lr_scheduler.decay_ratio lr_scheduler.decay_steps lr_scheduler.total_steps "
     "training.steps", _warmup),
    ("lr_scheduler.total_steps training.steps",
     lambda c, e: c.lr_scheduler.total_steps is not None and c.lr_scheduler.total_steps < c.training.steps
     and f"the learning rate would leave its schedule after step {c.lr_scheduler.total_steps}; must cover the run"),
    ("training.global_batch_size training.local_batch_size parallelism.context_parallel_degree", _global_batch),
    ("parallelism.data_parallel_replicate_degree parallelism.data_parallel_shard_degree "
     "parallelism.context_parallel_degree", _degrees),
    *map(_cut, ("training.seq_len", "validation.seq_len", "validation.lengths")),
    ("model.op_backend parallelism.context_parallel_degree",
     lambda c, e: c.parallelism.context_parallel_degree > 1 and c.model.op_backend in ("fla", "recurrent")
     and f'op_backend "{c.model.op_backend}" has no context parallelism: use "auto", "triton" or "chunk"'),
    _needs_cuda("training.enable_cpu_offload", True, "offloading to the CPU"),
    _needs_cuda("profiling.enable_profiling", True, "torchtitan's profiler"),
    _needs_cuda("profiling.enable_memory_snapshot", True, "a memory snapshot"),
    _needs_cuda("checkpoint.async_mode", "async_with_pinned_mem", "pinned memory"),
    ("compile.cuda_graph activation_checkpoint.mode model.op_backend training.enable_cpu_offload",
     lambda c, e: c.compile.cuda_graph == "always" and (reason := graph_obstacle(c, e))
     and f'no CUDA graph can be made: {reason}; use "auto", which makes one where it can'),
    ("profiling.profile_freq profiling.profiler_warmup profiling.profiler_active", _profile_cycle),
    ("activation_checkpoint.mode compile.enable compile.components",
     lambda c, e: c.activation_checkpoint.mode == "memory_budget"
     and not (c.compile.enable and "model" in c.compile.components)
     and 'needs [compile] enable = true with "model" among the components; or use "selective"'),
    ("compile.backend compile.enable", _backend),
    ("compile.components", lambda c, e: c.compile.enable and not c.compile.components
     and "nothing to compile: components is empty"),
    ("checkpoint.keep_every checkpoint.interval", lambda c, e: c.checkpoint.keep_every % c.checkpoint.interval
     and f"no milestone would be saved: must be a multiple of interval = {c.checkpoint.interval}"),
    ("checkpoint.keep_best checkpoint.interval validation.freq", _best),
    ("guard.hang_seconds comm.train_timeout_seconds",
     lambda c, e: c.guard.hang_seconds and c.guard.hang_seconds >= c.comm.train_timeout_seconds
     and f"collectives give up after {c.comm.train_timeout_seconds} s, before stacks are written; must be below that"),
    ("checkpoint.create_seed_checkpoint", lambda c, e: c.checkpoint.create_seed_checkpoint and (e.world_size or 1) > 1
     and f"is made by one process, not by {e.world_size} ranks: start it without torchrun"),
    ("checkpoint.initial_load_path",
     lambda c, e: e.files and c.checkpoint.initial_load_path and not os.path.isdir(c.checkpoint.initial_load_path)
     and f"no such folder (looked from {os.getcwd()})"),
    ("checkpoint.initial_load_model_only checkpoint.initial_load_path",
     lambda c, e: not c.checkpoint.initial_load_model_only and not c.checkpoint.initial_load_path
     and "the whole state of what? set initial_load_path; a run's own checkpoints are always loaded whole"),
    ("checkpoint.exclude_from_loading checkpoint.initial_load_model_only",
     lambda c, e: c.checkpoint.exclude_from_loading and c.checkpoint.initial_load_model_only
     and ("nothing but weights is loaded; parts of a whole state are left out with initial_load_model_only = false"
          if c.checkpoint.initial_load_path else
          "a run's own checkpoints are always loaded whole, so leave it out; it is for initial_load_path")),
    ("job.dump_folder", _run_folder),
    ("metrics.enable_wandb", lambda c, e: e.files and c.metrics.enable_wandb and find_spec("wandb") is None
     and "wandb is not installed: pip install wandb, or leave it out"),
]  # fmt: skip
"""The options that a contradiction is between, of which the first that was given is blamed, and what judges it."""

"""Judges a loaded config as a whole: refused options, ranges, and options that contradict each other.

    problems = check(config, sources, Environment(world_size=8, cuda=True))

A contradiction is one entry of `_RULES`: the keys it looks at, the first being the one to blame, and a
function that returns what is wrong or None. What depends on the machine is judged only as far as
`Environment` knows it.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..ops.triton_backend import ROWS
from .fields import get_value, schema
from .job import JobConfig
from .problems import Problem, Source, quoted
from .ranges import RANGES
from .schedule import decay_steps_of
from .snapshots import data_ranks
from .unsupported import refusal
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
        """This process: `WORLD_SIZE` as torchrun sets it (1 without), and whether CUDA is present."""
        import torch

        return cls(int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available(), files=True)


Judge = Callable[[JobConfig, Environment], str | None]


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
    problems, judged = [], set(unusable)
    for key, option in schema().items():
        value = get_value(config, key)
        if key in judged or value == option.default:
            continue
        source = sources.get(key, Source())
        if rule := refusal(key):
            problems.append(Problem(f"{source.label(key, value)}: {rule.reason}; {rule.instead}", source))
            judged.add(key)
        elif value is not None and key in RANGES and not RANGES[key].allows(value):
            text = f"{source.label(key, value)}: {RANGES[key].text}{quoted(option.summary)}"
            problems.append(Problem(text, source))
            judged.add(key)
    for keys, judge in _RULES:
        if judged.isdisjoint(keys) and (reason := judge(config, environment)):
            problems.append(_contradiction(config, sources, keys, reason))
    return problems


def _contradiction(config: JobConfig, sources: Mapping[str, Source], keys: tuple[str, ...], reason: str) -> Problem:
    """Blames the first of `keys` that the user set, and tells where the others come from."""
    blamed = next((key for key in keys if key in sources), keys[0])
    source = sources.get(blamed, Source(config.job.config_file or ""))
    others = []
    for key in keys:
        value = get_value(config, key)
        if key != blamed and (key in sources or value is not None):
            table, _, name = key.rpartition(".")
            others.append(f"[{table}] {name} = {show(value)}, {sources.get(key, 'default')}")
    context = f" (with {'; '.join(others)})" if others else ""
    return Problem(f"{source.label(blamed, get_value(config, blamed))}: {reason}{context}", source)


def _value_width(config: JobConfig, _: Environment) -> str | None:
    width = config.model.head_dim * config.model.expand_v
    if width >= 1 and abs(width - round(width)) < 1e-9 and int(width) == round(width):
        return None
    return f"head_dim * expand_v must be a whole number of at least 1, not {width:g}"


def _warmup_fits(config: JobConfig, _: Environment) -> str | None:
    schedule, total = config.lr_scheduler, _schedule_length(config)
    if schedule.warmup_steps > total:
        return (
            f"the warm-up does not fit in the schedule of {total} steps; shorten warmup_steps, or set "
            "[lr_scheduler] total_steps to follow the curve of a longer run"
        )
    decay = decay_steps_of(total, schedule.warmup_steps, schedule.decay_ratio)
    if schedule.warmup_steps + decay > total:
        return f"warm-up and a decay of {decay} steps do not fit in the schedule of {total} steps"
    return None


def _schedule_covers_run(config: JobConfig, _: Environment) -> str | None:
    if _schedule_length(config) >= config.training.steps:
        return None
    end = _schedule_length(config)
    return f"the learning rate would leave its schedule after step {end}; must cover the run"


def _schedule_length(config: JobConfig) -> int:
    total = config.lr_scheduler.total_steps
    return config.training.steps if total is None else total


def _degrees_fill_world(config: JobConfig, environment: Environment) -> str | None:
    world, parallelism = environment.world_size, config.parallelism
    replicate, shard = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    context = parallelism.context_parallel_degree
    fixed = replicate * context
    if world is None or fixed * shard == world or (shard == -1 and world % fixed == 0):
        return None
    sharing = f", each of them {context} ranks to a sequence" if context > 1 else ""
    if shard == -1:
        return f"{world} ranks cannot be divided into {replicate} replicas{sharing}"
    product = "replicate x shard x context" if context > 1 else "replicate x shard"
    return f"{product} = {fixed * shard}, but the job has {world} ranks"


def _rows_can_be_cut(key: str) -> Judge:
    """Context parallelism: equal parts of whole chunks, each longer than what a convolution reads of the one before."""

    def judge(config: JobConfig, _: Environment) -> str | None:
        ranks, value = config.parallelism.context_parallel_degree, get_value(config, key)
        # Rows of a chunk go to whole tokens; where n is no power of two, a part of the last chunk stays empty.
        chunk = max(1, ROWS >> (config.model.num_householder - 1).bit_length())
        step = ranks * -(-max(chunk, config.model.conv_size - 1) // chunk) * chunk
        least = step // ranks
        for length in value if isinstance(value, list) else [value]:
            if ranks > 1 and length % step:
                below = length // step * step
                choices = f"{below:,} or {below + step:,}" if below else f"{step:,}"
                return (
                    f"{length:,} tokens cannot be cut for {ranks} ranks: a multiple of {ranks} x {least} tokens "
                    f"(whole chunks) is needed; nearest: {choices}"
                )
        return None

    return judge


def _context_parallel_backend(config: JobConfig, _: Environment) -> str | None:
    backend = config.model.op_backend
    if config.parallelism.context_parallel_degree > 1 and backend in ("fla", "recurrent"):
        return f'op_backend "{backend}" has no context parallelism: use "auto" or "chunk"'
    return None


def _batch_divides(config: JobConfig, environment: Environment) -> str | None:
    training, world = config.training, environment.world_size
    if training.global_batch_size == -1:
        return None
    if training.global_batch_size % training.local_batch_size:
        return f"must be a multiple of local_batch_size = {training.local_batch_size}"
    if world is not None:
        world = data_ranks(config, world)
    if not world or training.global_batch_size % (training.local_batch_size * world) == 0:
        return None
    step = training.local_batch_size * world
    below = training.global_batch_size // step * step
    choices = f"{below} or {below + step}" if below else f"{step}"
    return f"must be a multiple of local_batch_size x {world} ranks = {step}; nearest: {choices}"


def _data_named(config: JobConfig, _: Environment) -> str | None:
    if config.data.kind == "prepared" and not config.data.paths:
        return "no data to train on; make some with python -m torchtitan_deltaproduct.data.prepare"
    return None


def _stream_named(config: JobConfig, _: Environment) -> str | None:
    if config.data.kind == "streaming" and not config.data.dataset:
        return "streaming needs [data] dataset"
    return None


def _stream_unmixed(config: JobConfig, _: Environment) -> str | None:
    if config.data.kind == "streaming" and config.data.paths:
        return "paths name prepared folders, which streaming does not read"
    if config.data.kind in _GENERATED and config.data.paths:
        return f"paths name prepared folders, which {config.data.kind} does not read"
    return None


def _only_read(key: str, when: str, is_read: Callable[[JobConfig], bool]) -> Judge:
    """Refuses an option in a setting in which nothing would read it."""
    default = schema()[key].default

    def judge(config: JobConfig, _: Environment) -> str | None:
        if is_read(config) or get_value(config, key) == default:
            return None
        return f"only read with {when}"

    return judge


def _only_read_by(key: str, *kinds: str) -> Judge:
    when = "kind = " + " or ".join(f'"{kind}"' for kind in kinds)
    return _only_read(key, when, lambda config: config.data.kind in kinds)


def _group_named(config: JobConfig, _: Environment) -> str | None:
    if config.data.kind == "group_word" and not config.data.group:
        return 'group_word needs [data] group, such as "S3" or "A4_x_Z5"'
    return None


def _curriculum_fits(config: JobConfig, _: Environment) -> str | None:
    start, steps, stop = config.data.curriculum_start, config.data.curriculum_steps, config.training.seq_len
    if bool(start) != bool(steps):
        return "a curriculum needs both curriculum_start (tokens) and curriculum_steps"
    return f"starts above training.seq_len = {stop}, the length it leads to" if start > stop else None


def _lengths_fit(config: JobConfig, _: Environment) -> str | None:
    low, high, room = config.data.min_length, config.data.max_length, config.training.seq_len
    if config.data.kind != "formal_language":
        return None
    if high > room:
        return f"rows of max_length = {high} tokens do not fit in training.seq_len = {room}"
    return f"max_length = {high} is below min_length = {low}" if high < low else None


def _tested_longer(config: JobConfig, _: Environment) -> str | None:
    lengths, low = config.validation.lengths, config.data.max_length
    if len(set(lengths)) < len(lengths):
        return "a length is listed twice"
    if config.data.kind == "formal_language" and lengths and min(lengths) < low:
        return f"length L has rows of max_length = {low} to L tokens: {min(lengths)} is too short"
    return None


def _weights_match(config: JobConfig, _: Environment) -> str | None:
    weights, paths = config.data.weights, config.data.paths
    if not weights or len(weights) == len(paths):
        return None
    return f"{len(weights)} weights for {len(paths)} paths; give one for each, or none"


def _paths_differ(config: JobConfig, _: Environment) -> str | None:
    repeated = {path for path in config.data.paths if config.data.paths.count(path) > 1}
    return f"{show(min(repeated))} is listed twice; give it a larger weight instead" if repeated else None


def _validation_data(config: JobConfig, _: Environment) -> str | None:
    if config.data.kind in _GENERATED:
        return "generated data is validated on generated samples" if config.validation.paths else None
    if config.validation.enable and not config.validation.paths:
        return "there is nothing to validate on"
    return None


def _fla_has_device(config: JobConfig, environment: Environment) -> str | None:
    if config.model.op_backend == "fla" and environment.cuda is False:
        return 'fla runs on CUDA only, and there is none; "auto" picks a backend that runs here'
    return None


def _fla_has_dtype(config: JobConfig, _: Environment) -> str | None:
    if config.model.op_backend == "fla" and config.training.mixed_precision_param == "float32":
        return "fla computes in bfloat16 or float16 only"
    return None


def _needs_cuda(enabled: Callable[[JobConfig], bool], what: str) -> Judge:
    def judge(config: JobConfig, environment: Environment) -> str | None:
        missing = environment.cuda is False and enabled(config)
        return f"{what} needs CUDA, and there is none" if missing else None

    return judge


def _profile_cycle(config: JobConfig, _: Environment) -> str | None:
    profiling = config.profiling
    cycle = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and cycle > profiling.profile_freq:
        return f"shorter than one cycle of {cycle} steps, profiler_warmup + profiler_active"
    return None


def _memory_budget(config: JobConfig, _: Environment) -> str | None:
    compiled = config.compile.enable and "model" in config.compile.components
    if config.activation_checkpoint.mode == "memory_budget" and not compiled:
        return 'needs [compile] enable = true with "model" among the components; or use "selective"'
    return None


def _compile_something(config: JobConfig, _: Environment) -> str | None:
    if config.compile.enable and not config.compile.components:
        return "nothing to compile: components is empty"
    return None


def _warn_only(config: JobConfig, _: Environment) -> str | None:
    if config.debug.deterministic_warn_only and not config.debug.deterministic:
        return "does nothing without deterministic = true"
    return None


def _weights_only_export(config: JobConfig, _: Environment) -> str | None:
    if config.checkpoint.export_dtype != "float32" and not config.checkpoint.last_save_model_only:
        return "does nothing without last_save_model_only = true: full checkpoints keep float32"
    return None


def _checkpointing_on(name: str, default: Any) -> Judge:
    def judge(config: JobConfig, _: Environment) -> str | None:
        asked = getattr(config.checkpoint, name) != default
        return "does nothing without enable = true" if asked and not config.checkpoint.enable else None

    return judge


def _milestones_are_saved(config: JobConfig, _: Environment) -> str | None:
    every, interval = config.checkpoint.keep_every, config.checkpoint.interval
    if every % interval == 0:
        return None
    return f"no milestone would be saved: must be a multiple of interval = {interval}"


def _hang_before_timeout(config: JobConfig, _: Environment) -> str | None:
    hang, timeout = config.guard.hang_seconds, config.comm.train_timeout_seconds
    if not hang or hang < timeout:
        return None
    return f"collectives give up after {timeout} s, before stacks are written; must be below that"


def _seed_checkpoint(config: JobConfig, environment: Environment) -> str | None:
    if config.checkpoint.create_seed_checkpoint and (environment.world_size or 1) > 1:
        return f"is made by one process, not by {environment.world_size} ranks: start it without torchrun"
    return None


def _run_folder_possible(config: JobConfig, environment: Environment) -> str | None:
    path = Path(config.job.dump_folder).absolute()
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if environment.files and not nearest.is_dir():
        return f"{nearest} is no folder, so there cannot be one"
    return None


def _wandb_installed(config: JobConfig, environment: Environment) -> str | None:
    if config.metrics.enable_wandb and environment.files and find_spec("wandb") is None:
        return "wandb is not installed: pip install wandb, or leave it out"
    return None


def _initial_load_exists(config: JobConfig, environment: Environment) -> str | None:
    path = config.checkpoint.initial_load_path
    if path and environment.files and not os.path.isdir(path):
        return f"no such folder (looked from {os.getcwd()})"
    return None


_GENERATED = ("group_word", "formal_language")

_RULES: tuple[tuple[tuple[str, ...], Judge], ...] = (
    (("model.expand_v", "model.head_dim"), _value_width),
    (("model.op_backend",), _fla_has_device),
    (("model.op_backend", "training.mixed_precision_param"), _fla_has_dtype),
    (("data.paths",), _data_named),
    (("data.kind", "data.dataset"), _stream_named),
    (("data.paths", "data.kind"), _stream_unmixed),
    (("data.group", "data.kind"), _group_named),
    *(((key, "data.kind"), _only_read_by(key, *kinds)) for keys, kinds in {
        "data.group data.curriculum_start data.curriculum_steps": ("group_word",),
        "data.language data.min_length data.max_length": ("formal_language",),
        "data.weights data.shuffle": ("prepared",),
        "data.dataset data.dataset_config data.split data.text_field data.eos data.shuffle_buffer":
            ("streaming",),
        "model.hf_assets_path data.reset_state_at_documents validation.seq_len validation.steps":
            ("prepared", "streaming"),
        "validation.lengths validation.samples": _GENERATED,
    }.items() for key in keys.split()),
    *(((key, by), _only_read(key, when, is_read)) for key, by, when, is_read in (
        ("data.seed", "data.shuffle_buffer", "a shuffle_buffer, since a stream is in file order without one",
         lambda config: config.data.kind != "streaming" or config.data.shuffle_buffer > 0),
        ("data.prefetch_factor", "data.num_workers", "num_workers of at least 1",
         lambda config: config.data.num_workers > 0),
        ("model.conv_size", "model.use_short_conv", "use_short_conv = true",
         lambda config: config.model.use_short_conv),
        ("model.hidden_ratio", "model.intermediate_size", "no intermediate_size, which overrides it",
         lambda config: config.model.intermediate_size is None),
    )),
    (("data.curriculum_start", "data.curriculum_steps", "training.seq_len"), _curriculum_fits),
    (("data.max_length", "data.min_length", "training.seq_len"), _lengths_fit),
    (("validation.lengths", "data.max_length"), _tested_longer),
    (("data.weights", "data.paths"), _weights_match),
    (("data.paths",), _paths_differ),
    (("validation.enable", "validation.paths", "data.kind"), _validation_data),
    (("lr_scheduler.warmup_steps", "lr_scheduler.decay_ratio", "lr_scheduler.total_steps", "training.steps"),
     _warmup_fits),
    (("lr_scheduler.total_steps", "training.steps"), _schedule_covers_run),
    (("training.global_batch_size", "training.local_batch_size"), _batch_divides),
    (("parallelism.data_parallel_replicate_degree", "parallelism.data_parallel_shard_degree",
      "parallelism.context_parallel_degree"), _degrees_fill_world),
    *(((key, "parallelism.context_parallel_degree"), _rows_can_be_cut(key))
      for key in ("training.seq_len", "validation.seq_len", "validation.lengths")),
    (("model.op_backend", "parallelism.context_parallel_degree"), _context_parallel_backend),
    (("training.enable_cpu_offload",),
     _needs_cuda(lambda config: config.training.enable_cpu_offload, "offloading to the CPU")),
    (("profiling.enable_profiling",),
     _needs_cuda(lambda config: config.profiling.enable_profiling, "torchtitan's profiler")),
    (("profiling.enable_memory_snapshot",),
     _needs_cuda(lambda config: config.profiling.enable_memory_snapshot, "a memory snapshot")),
    (("checkpoint.async_mode",),
     _needs_cuda(lambda config: config.checkpoint.async_mode == "async_with_pinned_mem", "pinned memory")),
    (("profiling.profile_freq", "profiling.profiler_warmup", "profiling.profiler_active"), _profile_cycle),
    (("activation_checkpoint.mode", "compile.enable", "compile.components"), _memory_budget),
    (("compile.components",), _compile_something),
    (("debug.deterministic_warn_only", "debug.deterministic"), _warn_only),
    (("checkpoint.export_dtype", "checkpoint.last_save_model_only"), _weights_only_export),
    *(((f"checkpoint.{name}", "checkpoint.enable"), _checkpointing_on(name, default)) for name, default in {
        "initial_load_path": None, "load_step": -1, "load_only": False, "create_seed_checkpoint": False,
        "enable_first_step_checkpoint": False}.items()),
    (("checkpoint.keep_every", "checkpoint.interval"), _milestones_are_saved),
    (("guard.hang_seconds", "comm.train_timeout_seconds"), _hang_before_timeout),
    (("checkpoint.create_seed_checkpoint",), _seed_checkpoint),
    (("checkpoint.initial_load_path",), _initial_load_exists),
    (("job.dump_folder",), _run_folder_possible),
    (("metrics.enable_wandb",), _wandb_installed),
)  # fmt: skip

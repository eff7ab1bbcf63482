"""Judges a loaded config: options that are refused, out of range or read by nobody, and those that contradict another.

    problems = check(config, sources, Environment(world_size=8, cuda=True))

What one option alone decides stands in its record. A contradiction is a function under `@rule` with the keys it looks
at, the first being the one to blame, that returns what is wrong or None. What depends on the machine is judged only as
far as `Environment` knows it.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..options import value_of
from .job import GENERATED, JobConfig
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
        """This process: `WORLD_SIZE` as torchrun sets it (1 without), and whether CUDA is present."""
        import torch

        return cls(int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available(), files=True)


Judge = Callable[[JobConfig, Environment], str | None]
RULES: list[tuple[tuple[str, ...], Judge]] = []


def rule(*keys: str) -> Callable[[Judge], Judge]:
    """Makes a function one of the contradictions that `check` looks for."""

    def add(judge: Judge) -> Judge:
        RULES.append((keys, judge))
        return judge

    return add


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
        value, record = value_of(config, key), option.record
        if key in judged or value == option.default:
            continue
        reason = None
        if record.refused:
            reason = f"{record.refused.reason}; {record.refused.instead}"
        elif value is not None and record.allowed and not record.allowed.allows(value):
            reason = f"{record.allowed.text}{quoted(option.summary)}"
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
    for keys, judge in RULES:
        if judged.isdisjoint(keys) and (reason := judge(config, environment)):
            problems.append(_contradiction(config, sources, keys, reason))
    return problems


def _contradiction(config: JobConfig, sources: Mapping[str, Source], keys: tuple[str, ...], reason: str) -> Problem:
    """Blames the first of `keys` that the user set, and tells where the others come from."""
    blamed = next((key for key in keys if key in sources), keys[0])
    source = sources.get(blamed, Source(config.job.config_file or ""))
    others = []
    for key in keys:
        value = value_of(config, key)
        if key != blamed and (key in sources or value is not None):
            table, _, name = key.rpartition(".")
            others.append(f"[{table}] {name} = {show(value)}, {sources.get(key, 'default')}")
    context = f" (with {'; '.join(others)})" if others else ""
    return Problem(f"{source.label(blamed, value_of(config, blamed))}: {reason}{context}", source)


@rule("model.expand_v", "model.head_dim")
def value_width(config: JobConfig, _: Environment) -> str | None:
    width = config.model.head_dim * config.model.expand_v
    if width >= 1 and abs(width - round(width)) < 1e-9 and int(width) == round(width):
        return None
    return f"head_dim * expand_v must be a whole number of at least 1, not {width:g}"


@rule("model.op_backend")
def fla_has_device(config: JobConfig, environment: Environment) -> str | None:
    if config.model.op_backend == "fla" and environment.cuda is False:
        return 'fla runs on CUDA only, and there is none; "auto" picks a backend that runs here'
    return None


@rule("model.op_backend", "training.mixed_precision_param")
def fla_has_dtype(config: JobConfig, _: Environment) -> str | None:
    if config.model.op_backend == "fla" and config.training.mixed_precision_param == "float32":
        return "fla computes in bfloat16 or float16 only"
    return None


@rule("data.paths")
def data_named(config: JobConfig, _: Environment) -> str | None:
    if config.data.kind == "prepared" and not config.data.paths:
        return "no data to train on; make some with python -m torchtitan_deltaproduct.data.prepare"
    return None


@rule("data.kind", "data.dataset")
def stream_named(config: JobConfig, _: Environment) -> str | None:
    missing = config.data.kind == "streaming" and not config.data.dataset
    return "streaming needs [data] dataset" if missing else None


@rule("data.group", "data.kind")
def group_named(config: JobConfig, _: Environment) -> str | None:
    missing = config.data.kind == "group_word" and not config.data.group
    return 'group_word needs [data] group, such as "S3" or "A4_x_Z5"' if missing else None


@rule("data.curriculum_start", "data.curriculum_steps", "training.seq_len")
def curriculum_fits(config: JobConfig, _: Environment) -> str | None:
    start, steps, stop = config.data.curriculum_start, config.data.curriculum_steps, config.training.seq_len
    if bool(start) != bool(steps):
        return "a curriculum needs both curriculum_start (tokens) and curriculum_steps"
    return f"starts above training.seq_len = {stop}, the length it leads to" if start > stop else None


@rule("data.max_length", "data.min_length", "training.seq_len")
def lengths_fit(config: JobConfig, _: Environment) -> str | None:
    low, high, room = config.data.min_length, config.data.max_length, config.training.seq_len
    if config.data.kind != "formal_language":
        return None
    if high > room:
        return f"rows of max_length = {high} tokens do not fit in training.seq_len = {room}"
    return f"max_length = {high} is below min_length = {low}" if high < low else None


@rule("validation.lengths", "data.max_length")
def tested_longer(config: JobConfig, _: Environment) -> str | None:
    lengths, low = config.validation.lengths, config.data.max_length
    if len(set(lengths)) < len(lengths):
        return "a length is listed twice"
    if config.data.kind == "formal_language" and lengths and min(lengths) < low:
        return f"length L has rows of max_length = {low} to L tokens: {min(lengths)} is too short"
    return None


@rule("data.weights", "data.paths")
def weights_match(config: JobConfig, _: Environment) -> str | None:
    weights, paths = config.data.weights, config.data.paths
    if not weights or len(weights) == len(paths):
        return None
    return f"{len(weights)} weights for {len(paths)} paths; give one for each, or none"


@rule("data.paths")
def paths_differ(config: JobConfig, _: Environment) -> str | None:
    repeated = {path for path in config.data.paths if config.data.paths.count(path) > 1}
    return f"{show(min(repeated))} is listed twice; give it a larger weight instead" if repeated else None


@rule("validation.enable", "validation.paths", "data.kind")
def validation_data(config: JobConfig, _: Environment) -> str | None:
    if GENERATED.holds(config):
        return "generated data is validated on generated samples" if config.validation.paths else None
    missing = config.validation.enable and not config.validation.paths
    return "there is nothing to validate on" if missing else None


@rule("lr_scheduler.warmup_steps", "lr_scheduler.decay_ratio", "lr_scheduler.total_steps", "training.steps")
def warmup_fits(config: JobConfig, _: Environment) -> str | None:
    schedule = Schedule.of(config.lr_scheduler, config.training.steps)
    total, decay = schedule.total_steps, schedule.decay_steps
    if schedule.warmup_steps > total:
        return (
            f"the warm-up does not fit in the schedule of {total} steps; shorten warmup_steps, or set "
            "[lr_scheduler] total_steps to follow the curve of a longer run"
        )
    if not schedule.fits:
        return f"warm-up and a decay of {decay} steps do not fit in the schedule of {total} steps"
    return None


@rule("lr_scheduler.total_steps", "training.steps")
def schedule_covers_run(config: JobConfig, _: Environment) -> str | None:
    end = config.lr_scheduler.total_steps
    if end is None or end >= config.training.steps:
        return None
    return f"the learning rate would leave its schedule after step {end}; must cover the run"


@rule("training.global_batch_size", "training.local_batch_size")
def batch_divides(config: JobConfig, environment: Environment) -> str | None:
    training, world = config.training, environment.world_size
    if training.global_batch_size == -1:
        return None
    if training.global_batch_size % training.local_batch_size:
        return f"must be a multiple of local_batch_size = {training.local_batch_size}"
    if world is None or training.global_batch_size % (training.local_batch_size * world) == 0:
        return None
    step = training.local_batch_size * world
    below = training.global_batch_size // step * step
    choices = f"{below} or {below + step}" if below else f"{step}"
    return f"must be a multiple of local_batch_size x {world} ranks = {step}; nearest: {choices}"


@rule("parallelism.data_parallel_replicate_degree", "parallelism.data_parallel_shard_degree")
def degrees_fill_world(config: JobConfig, environment: Environment) -> str | None:
    world, parallelism = environment.world_size, config.parallelism
    replicate, shard = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    if world is None or replicate * shard == world or (shard == -1 and world % replicate == 0):
        return None
    if shard == -1:
        return f"{world} ranks cannot be divided into {replicate} replicas"
    return f"replicate x shard = {replicate * shard}, but the job has {world} ranks"


def needs_cuda(key: str, setting: object, what: str) -> Judge:
    def judge(config: JobConfig, environment: Environment) -> str | None:
        missing = environment.cuda is False and value_of(config, key) == setting
        return f"{what} needs CUDA, and there is none" if missing else None

    return rule(key)(judge)


needs_cuda("training.enable_cpu_offload", True, "offloading to the CPU")
needs_cuda("profiling.enable_profiling", True, "torchtitan's profiler")
needs_cuda("profiling.enable_memory_snapshot", True, "a memory snapshot")
needs_cuda("checkpoint.async_mode", "async_with_pinned_mem", "pinned memory")


@rule("profiling.profile_freq", "profiling.profiler_warmup", "profiling.profiler_active")
def profile_cycle(config: JobConfig, _: Environment) -> str | None:
    profiling = config.profiling
    cycle = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and cycle > profiling.profile_freq:
        return f"shorter than one cycle of {cycle} steps, profiler_warmup + profiler_active"
    return None


@rule("activation_checkpoint.mode", "compile.enable", "compile.components")
def memory_budget(config: JobConfig, _: Environment) -> str | None:
    compiled = config.compile.enable and "model" in config.compile.components
    if config.activation_checkpoint.mode == "memory_budget" and not compiled:
        return 'needs [compile] enable = true with "model" among the components; or use "selective"'
    return None


@rule("compile.components")
def compile_something(config: JobConfig, _: Environment) -> str | None:
    nothing = config.compile.enable and not config.compile.components
    return "nothing to compile: components is empty" if nothing else None


@rule("checkpoint.keep_every", "checkpoint.interval")
def milestones_are_saved(config: JobConfig, _: Environment) -> str | None:
    every, interval = config.checkpoint.keep_every, config.checkpoint.interval
    return f"no milestone would be saved: must be a multiple of interval = {interval}" if every % interval else None


@rule("guard.hang_seconds", "comm.train_timeout_seconds")
def hang_before_timeout(config: JobConfig, _: Environment) -> str | None:
    hang, timeout = config.guard.hang_seconds, config.comm.train_timeout_seconds
    if not hang or hang < timeout:
        return None
    return f"collectives give up after {timeout} s, before stacks are written; must be below that"


@rule("checkpoint.create_seed_checkpoint")
def seed_checkpoint(config: JobConfig, environment: Environment) -> str | None:
    if config.checkpoint.create_seed_checkpoint and (environment.world_size or 1) > 1:
        return f"is made by one process, not by {environment.world_size} ranks: start it without torchrun"
    return None


@rule("checkpoint.initial_load_path")
def initial_load_exists(config: JobConfig, environment: Environment) -> str | None:
    path = config.checkpoint.initial_load_path
    missing = path and environment.files and not os.path.isdir(path)
    return f"no such folder (looked from {os.getcwd()})" if missing else None


@rule("job.dump_folder")
def run_folder_possible(config: JobConfig, environment: Environment) -> str | None:
    path = Path(config.job.dump_folder).absolute()
    lowest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    return f"{lowest} is no folder, so there cannot be one" if environment.files and not lowest.is_dir() else None


@rule("metrics.enable_wandb")
def wandb_installed(config: JobConfig, environment: Environment) -> str | None:
    missing = config.metrics.enable_wandb and environment.files and find_spec("wandb") is None
    return "wandb is not installed: pip install wandb, or leave it out" if missing else None

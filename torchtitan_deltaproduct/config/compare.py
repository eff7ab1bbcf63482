"""Is this the run that the checkpoints in its folder belong to?

    comparison = compare_configs(read_snapshot(folder / "config.json"), snapshot(config))      # config.snapshots
    refuse_breaking(comparison, folder, config.provenance)        # ConfigError
    for change in comparison.notable + comparison.harmless:
        logger.info("%s", change)                                 # optimizer.lr: 0.0003 -> 0.0001 (...)

What a change of an option means is in its record (`options.Resume`); what else a snapshot holds is in `DERIVED`. A
change of the schedule that makes the learning rate rise after it had fallen is allowed, and `rate_rises` says so.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import ConfigError
from ..options import OTHER_MODEL, Resume, breaking, harmless, notable
from .job import OTHER_DATA, OTHER_ROUNDING, JobConfig, LRScheduler
from .schedule import Schedule
from .schema import schema
from .values import flatten, shorten, show

VERSION = notable("results may differ in rounding")
UNKNOWN_TO_ONE = "only one of the two versions has it"
DERIVED = {
    "derived.mlp_size": OTHER_MODEL,
    "derived.global_batch_size": breaking("another number of samples a step"),
    "derived.world_size": OTHER_ROUNDING,
    "extra.data_identity": OTHER_DATA,
    "versions.torch": VERSION,
    "versions.torchtitan": VERSION,
    "versions.flash-linear-attention": VERSION,
    "versions.triton": VERSION,
}


@dataclass(frozen=True)
class Change:
    """One value that differs from the saved run's."""

    key: str
    old: Any
    new: Any
    why: str

    @property
    def name(self) -> str:
        return self.key.removeprefix("derived.").removeprefix("extra.")

    def __str__(self) -> str:
        return f"{self.name}: {shorten(show(self.old))} -> {shorten(show(self.new))} ({self.why})"


@dataclass
class Comparison:
    """What differs, by consequence."""

    breaking: list[Change] = field(default_factory=list)
    notable: list[Change] = field(default_factory=list)
    harmless: list[Change] = field(default_factory=list)


def meaning(key: str) -> Resume | None:
    """What a change of a key of a snapshot means; None if nobody knows it."""
    if key in schema():
        return schema()[key].record.resume
    return DERIVED.get(key) or (harmless("for the record") if key.startswith("versions.") else None)


def compare_configs(saved: Mapping[str, Any], current: Mapping[str, Any], consumed: bool = True) -> Comparison:
    """Compares two snapshots (see `snapshot`).

    Args:
        saved: of the checkpoint.
        current: of this launch.
        consumed: whether training goes on in the checkpoint's data; False where it begins anew, from the weights of a
            seed checkpoint say: then only another model breaks.

    An option that one of the two does not know (another version of this package wrote it) is notable: it
    cannot have had an effect there. With equal `extra["data_identity"]`, other folders hold the same data.
    """
    old, new = _flatten(saved), _flatten(current)
    identity = old.get("extra.data_identity")
    same_data = identity is not None and identity == new.get("extra.data_identity")
    comparison = Comparison()
    for key in [*new, *(key for key in old if key not in new)]:
        if key in old and key in new and old[key] == new[key]:
            continue
        change = meaning(key) or breaking("an option whose effect nobody classified")
        if key not in old or key not in new:
            # The first run under a version with a new option must not be refused for it.
            kind = harmless if change.kind == "harmless" else notable
            change = kind(UNKNOWN_TO_ONE)
        elif key == "data.paths" and same_data:
            change = notable("the same data in another place")
        elif key == "model.hf_assets_path" and new.get("data.kind") == "streaming":
            change = breaking("the tokenizer decides the tokens")
        if change.kind == "breaking" and not consumed and not change.from_the_start:
            change = notable("no sample was trained on yet")
        getattr(comparison, change.kind).append(Change(key, old.get(key), new.get(key), change.why))
    return comparison


def refuse_breaking(
    comparison: Comparison, checkpoint: str | os.PathLike, provenance: Mapping[str, str] | None = None, way: str = ""
) -> None:
    """Raises ConfigError if the config cannot continue the run that saved `checkpoint`; `way`: what to do instead."""
    if not comparison.breaking:
        return
    lines = []
    for change in comparison.breaking:
        origin = (provenance or {}).get(change.key)
        place = f" ({origin})" if origin else ""
        old, new = shorten(show(change.old)), shorten(show(change.new))
        lines.append(f"  {change.name} was {old}, is {new}{place}: {change.why}")
    if any(change.why == OTHER_MODEL.why for change in comparison.breaking):
        instead = "put the old values back to continue it, or train the other model in another job.dump_folder"
    else:
        instead = (
            "put the old values back to continue it, or start a new run from its weights with\n"
            f"  --job.dump_folder NEW_FOLDER --checkpoint.initial_load_path {checkpoint}\n"
            "and, if they are set, without initial_load_model_only and exclude_from_loading"
        )
    raise ConfigError(f"{checkpoint} belongs to another run:\n" + "\n".join(lines) + f"\n{way or instead}")


def keep_warmup(saved: Mapping[str, Any], config: JobConfig, current: dict[str, Any], step: int) -> None:
    """Keeps the warm-up that a run has behind it, where that of the config would be a second one.

    A run that the command line cuts short has a shorter warm-up than its file says (`load.shorten_warmup`). Going on to
    another end it keeps that, unless the file or the command line says another now; `provenance` says so.

    Args:
        saved: snapshot of the checkpoint.
        config, current: of this launch, and its snapshot; both are changed.
        step: optimizer steps taken.
    """
    key, table, in_file = "lr_scheduler.warmup_steps", config.lr_scheduler, saved.get("extra", {}).get("warmup_in_file")
    if in_file is None or in_file != (config.warmup_in_file or table.warmup_steps):
        return
    warmup = saved["config"]["lr_scheduler"]["warmup_steps"]
    if warmup > step or config.provenance[key] == "command line":
        return
    if warmup != table.warmup_steps:
        config.provenance[key] = f"stays {warmup}, not {table.warmup_steps}: the warm-up of this run is over"
    config.warmup_in_file = current["extra"]["warmup_in_file"] = in_file
    table.warmup_steps = current["config"]["lr_scheduler"]["warmup_steps"] = warmup


def rate_rises(saved: Mapping[str, Any], config: JobConfig, step: int) -> str:
    """Says that a run goes on at a higher learning rate than it had come down to, or "".

    Args:
        saved: snapshot of the checkpoint.
        config: of this launch.
        step: optimizer steps taken.
    """
    before = schedule_of(saved)
    if before is None:
        return ""
    reached = before(step - 1)
    after = Schedule.of(config.lr_scheduler, config.training.steps)
    if not before.last_at_peak < step < after.total_steps or after(step) <= reached:
        return ""
    way = "a larger training.steps stretches the decay"
    if "stable" in before.phases():
        way = f"to extend the stable phase, go back to a step up to {before.last_at_peak:,} with checkpoint.load_step"
    rise = f"at {reached:.0%} of the peak rate, and goes on at {after(step):.0%}"
    return f"step {step:,} was saved in its decay, {rise}; {way}"


def same_rates(saved: Mapping[str, Any], config: JobConfig, step: int) -> bool:
    """Whether the learning rates of the first `step` steps are those of `config`, for a checkpoint's snapshot."""
    before, now = schedule_of(saved), Schedule.of(config.lr_scheduler, config.training.steps)
    return before is not None and all(before(done) == now(done) for done in range(step))


def schedule_of(saved: Mapping[str, Any]) -> Schedule | None:
    """The schedule that a snapshot describes; None: it does not."""
    known = {field.name for field in fields(LRScheduler)}
    try:
        table = LRScheduler(**{k: v for k, v in saved["config"]["lr_scheduler"].items() if k in known})
        schedule = Schedule.of(table, saved["config"]["training"]["steps"])
        # Its last step shows whether this version knows the kind of decay.
        schedule(schedule.total_steps - 1)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return schedule


def _flatten(content: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys: those of the config without a prefix, the other parts under their name."""
    identity = content.get("extra", {}).get("data_identity")
    return {
        **flatten(content.get("config", {})),
        **flatten({name: content.get(name, {}) for name in ("derived", "versions")}),
        **({} if identity is None else {"extra.data_identity": identity}),
    }

"""A run as its folder tells it: settings, records and events, damaged or missing files named and never in the way.

    run = read_run("outputs/run")
    run.settings["model.num_householder"]         # 2
    run.steps[-1]["loss"], run.validations[-1]["validation_loss"]
    run.problems                                  # ["config.json: not there"]

Needs neither torch nor the machine that trains; of years of records the newest and places all over them are read.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from . import arguments
from .config.snapshots import read_snapshot
from .config.values import flatten, shorten, show
from .errors import CheckpointError, UserError
from .events import began, read_events
from .files import read_bytes
from .formats import LARGEST
from .history import WHOLE, overview, thinned
from .models.args import DeltaProductArgs
from .models.counts import training_flops_per_token

UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Characters that steer a terminal, turn the direction of writing or are none; not tabs and ends of lines."""


@dataclass
class Run:
    """What was read of a run folder.

    Attributes:
        snapshot: config.json; {} if it cannot be read.
        records: of metrics.jsonl, in its order, numbers only where they are finite.
        whole: whether these are all there are.
        events: of events.jsonl.
        problems: what is missing or damaged, in words.
    """

    path: Path
    snapshot: dict[str, Any]
    records: list[dict[str, Any]]
    whole: bool
    events: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Dotted keys of the config, and `world_size`."""
        ranks = self.part("derived").get("world_size")
        return flatten(self.part("config")) | ({} if ranks is None else {"world_size": ranks})

    def part(self, name: str) -> dict[str, Any]:
        """A table of config.json: config, derived, versions or extra; {} without it."""
        content = self.snapshot.get(name)
        return content if isinstance(content, dict) else {}

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Records of training steps with a finite loss."""
        return [record for record in self.records if record.get("loss") is not None]

    @cached_property
    def validations(self) -> list[dict[str, Any]]:
        """Records of validations with a finite loss."""
        return [record for record in self.records if record.get("validation_loss") is not None]

    @property
    def thinned(self) -> bool:
        """Whether it has more validations than were read."""
        last = self.validations[-1]["step"] if self.validations else 0
        return not self.whole and thinned(last, validated_every(self.snapshot))

    @cached_property
    def best(self) -> dict[str, Any] | None:
        """The validation of the lowest loss."""
        return min(self.validations, key=lambda record: record["validation_loss"], default=None)

    @cached_property
    def last_loss(self) -> float | None:
        """Mean training loss of the last 20 steps."""
        last = [record["loss"] for record in self.steps[-20:]]
        return sum(last) / len(last) if last else None

    def last(self, name: str) -> float | None:
        """The newest value of a name in any record."""
        return next((r[name] for r in reversed(self.records) if r.get(name) is not None), None)

    @cached_property
    def speed(self) -> float | None:
        """Median of tokens a second over the steps that were read: one that compiles or saves is not typical."""
        speeds = sorted(r["tokens_per_second"] for r in self.steps if r.get("tokens_per_second") is not None)
        return speeds[len(speeds) // 2] if speeds else None

    @cached_property
    def seconds(self) -> dict[float, float]:
        """Seconds of running by the time of a record: since the first launch, without the time between launches.

        A launch that is refused leaves a stop at no step, and no launch: what comes before it is such time, too.
        """
        first = began(self.events)
        launches = {event["time"] for event in self.events if event["event"] == "launch"}
        before_a_step = {event["time"] for event in self.events if event["event"] == "stop" and event["step"] is None}
        times = {r["time"] for r in [*self.records, *self.events] if isinstance(r.get("time"), int | float)}
        elapsed, last, result = 0.0, None, {}
        for time in sorted(time for time in times if abs(time) < LARGEST and (first is None or time >= first)):
            idle = last is None or time in launches or (time in before_a_step and last not in launches)
            elapsed += 0 if idle else time - last
            last, result[time] = time, elapsed
        return result

    @cached_property
    def flops_per_token(self) -> int | None:
        """FLOPs of forward and backward, by the closed formula; None if config.json does not tell the model."""
        model = self.part("config").get("model")
        names = DeltaProductArgs.__dataclass_fields__
        try:
            numbers = {k: v for k, v in model.items() if k in names and isinstance(v, int | float | None)}
            flops = training_flops_per_token(DeltaProductArgs(**numbers))
        except (AttributeError, TypeError, ValueError, ArithmeticError):
            return None
        return flops if 0 < flops < LARGEST else None


def read_run(folder: str | os.PathLike, limit: int = WHOLE) -> Run:
    """Reads a run folder; of a metrics.jsonl longer than `limit` bytes about as many (see `history.overview`).

    Raises:
        UserError: there is no folder, or neither records nor events in it.
    """
    path, problems = Path(folder), []
    try:
        snapshot = read_snapshot(path / "config.json")
        if snapshot is None:
            problems.append("config.json: not there")
    except CheckpointError as error:
        snapshot = None
        problems.append("config.json: " + str(error).split("; ")[0].removeprefix(f"{path / 'config.json'} "))
    snapshot = snapshot or {}
    found, whole = overview(path / "metrics.jsonl", validated_every(snapshot), limit)
    records = [{name: value for name, value in r.items() if value is None or abs(value) < LARGEST} for r in found]
    events = read_events(path)
    if not records and not events:
        what = "has neither metrics.jsonl nor events.jsonl" if path.is_dir() else "is not a folder"
        raise UserError(f"{path} {what}; expected the dump_folder of a run that was started")
    for name, read in (("metrics.jsonl", records if whole else None), ("events.jsonl", events)):
        if problem := damage(path / name, read):
            problems.append(f"{name}: {problem}")
    return Run(path, snapshot, records, whole, events, problems)


def validated_every(snapshot: Mapping[str, Any]) -> int | None:
    """Steps between the validations of a run, if its config.json tells."""
    try:
        every = snapshot["config"]["validation"]["freq"]
    except (KeyError, TypeError):
        return None
    return every if type(every) is int and every > 0 else None


def damage(path: Path, records: list | None) -> str:
    """What is wrong with a file of records, of which so many were read (None: only a part of it); "" if nothing is."""
    if not path.exists():
        return "not there"
    try:
        # A line that is being written has no end yet.
        lines = [] if path.stat().st_size > WHOLE else read_bytes(path).splitlines(keepends=True)
    except OSError as error:
        return error.strerror or str(error)
    complete = sum(line.endswith(b"\n") and bool(line.strip()) for line in lines)
    if records is None or complete <= len(records):
        return "" if path.stat().st_size else "empty"
    return f"{complete - len(records)} of {complete} lines damaged, left out"


def short_names(runs: list[Path]) -> list[str]:
    """Paths below the folder that all lie in, as text; of a single run, its own name."""
    paths = [os.path.realpath(run) for run in runs]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [arguments.shown(os.path.relpath(path, common)) for path in paths]


def visible(text: str) -> str:
    """Text of several lines that does nothing but stand there: `\\x1b[2J` and `\\u202e` for what is not seen of it."""
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def shown(value: Any, width: int = 40) -> str:
    """A setting as text of at most `width` characters, none of them invisible."""
    text = value if isinstance(value, str) else show(value)
    return shorten("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: 4 * width]), width)


def telling(own: Mapping[str, Any], keys: list[str], settings: list[Mapping[str, Any]]) -> list[str]:
    """Of the keys in which some settings differ, as few as tell one of them from the others.

    As few as tell as many apart, and of more than two of those only the ones in which it is not like most, if any.
    """

    def kinds(some: list[str]) -> int:
        return len({str([one.get(key) for key in some]) for one in settings})

    for key in reversed(keys):
        fewer = [other for other in keys if other != key]
        keys = fewer if kinds(fewer) == kinds(keys) else keys
    alike = {key: sum(one.get(key) == own[key] for one in settings) for key in keys}
    return [key for key in keys if 2 * alike[key] <= len(settings)] if len(keys) > 2 else keys

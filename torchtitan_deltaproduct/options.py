"""One record an option: its values, what a change of it means to a run that goes on, who reads it, other names of it.

A field of the config carries its record in its metadata, and its help is the doc string below it:

    @dataclass
    class Data:
        split: str = option("train", breaking("other data"), NOT_EMPTY, reader=read_with("data.kind", "streaming"))
        \"""streaming: split to train on.\"""

Ranges, refusals, the comparison on resume, the nearest names, `--help` and docs/config.md are all made of these records
(see `config.schema`). This module needs the standard library alone, so that `models.args` can use it.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Literal


@dataclass(frozen=True)
class Range:
    """The values an option may take."""

    allows: Callable[[Any], bool]
    text: str
    """Completes a sentence that begins with the value: "must be at least 1"."""
    highest: float = math.inf
    """A number above it is a slip that would fail far from here."""

    def refusal(self, value: Any) -> str | None:
        """What is wrong with a value, or None."""
        if not self.allows(value):
            return self.text
        return f"must be at most {self.highest:,}" if self.highest < math.inf and value > self.highest else None


@dataclass(frozen=True)
class Resume:
    """What a change of an option means for a run that is resumed with it.

    Breaking: the result would be no continuation (another model, other data, another batch). Notable: allowed, and
    worth a line in the log. Harmless: changes nothing that is learned.
    """

    kind: Literal["breaking", "notable", "harmless"]
    why: str
    from_the_start: bool = False
    """Breaking even where no sample was trained on yet, as from a seed checkpoint."""


@dataclass(frozen=True)
class Reader:
    """The settings in which an option is read; anywhere else it must not be given."""

    by: str
    """Key of the option that decides."""
    holds: Callable[[Any], bool]
    """Whether the option is read under a config."""
    otherwise: str
    """Why it is refused where it is not read; `{}` stands for the value of `by`."""


@dataclass(frozen=True)
class Refusal:
    """Why an option that torchtitan has is not honoured here, and what to do instead."""

    reason: str
    instead: str


@dataclass(frozen=True)
class Option:
    """The record of one option; see the class of each part."""

    resume: Resume
    allowed: Range | None = None
    """None: every value of its type."""
    reader: Reader | None = None
    """None: it is read in every setting."""
    aliases: tuple[str, ...] = ()
    """What other trainers and model configs call it."""
    is_path: bool = False
    """Whether it names files or folders: `~` in front is the home folder then."""
    is_prose: bool = False
    """Whether a list holds texts of any form: on a command line one text as it is, commas too, or a TOML list."""
    refused: Refusal | None = None


def option(default: Any, resume: Resume, allowed: Range | None = None, **more: Any) -> Any:
    """A dataclass field with its record.

    Args:
        default: its default; a list is copied for each config.
        resume: what a change of it means.
        allowed: its range.
        more: `reader`, `is_path`, `is_prose`, and `aliases`, in one string.
    """
    metadata = {"option": record(resume, allowed, **more)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def record(resume: Resume, allowed: Range | None = None, *, aliases: str = "", **more: Any) -> Option:
    """The record alone, for a field that somebody else declares."""
    return Option(resume, allowed, aliases=tuple(aliases.split()), **more)


def refused(reason: str, instead: str) -> Option:
    """The record of an option that must be left alone."""
    return Option(breaking("an option that is not supported"), refused=Refusal(reason, instead))


def breaking(why: str, from_the_start: bool = False) -> Resume:
    return Resume("breaking", why, from_the_start)


def notable(why: str) -> Resume:
    return Resume("notable", why)


def harmless(why: str) -> Resume:
    return Resume("harmless", why)


def read_with(key: str, *values: Any, otherwise: str = "") -> Reader:
    """Read where the option `key` has one of `values`."""
    name, choices = key.rpartition(".")[2], " or ".join(map(json.dumps, values))
    otherwise = otherwise or f"only read with {name} = {choices}"
    return Reader(key, lambda config: value_of(config, key) in values, otherwise)


def value_of(config: Any, key: str) -> Any:
    """`config.training.steps` for the key "training.steps"."""
    return reduce(getattr, key.split("."), config)


def at_least(low: float, why: str = "") -> Range:
    return Range(lambda value: value >= low, f"must be at least {low}{why}")


def within(low: float, high: float, why: str = "") -> Range:
    return Range(lambda value: low <= value <= high, f"must lie between {low} and {high}{why}")


def at_least_or(special: int, low: int, meaning: str) -> Range:
    return Range(lambda value: value == special or value >= low, f"must be at least {low}, or {special} for {meaning}")


def only(*choices: str) -> Range:
    """Of a list."""
    listed = ", ".join(f'"{choice}"' for choice in choices)
    return Range(lambda value: set(value) <= set(choices), f"may hold only {listed}")


POSITIVE = Range(lambda value: value > 0, "must be positive")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "must be at least 0 and below 1")
NOT_EMPTY = Range(lambda value: bool(value.strip()), "must not be empty")
NO_BLANKS = Range(lambda value: all(item.strip() for item in value), "must not hold an empty name")
SEED = within(0, 2**63 - 1)
COUNT = replace(at_least(1), highest=2**31 - 1)
COUNT_OR_ZERO = replace(at_least(0), highest=2**31 - 1)

OTHER_MODEL = breaking("another model", from_the_start=True)

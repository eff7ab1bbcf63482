"""A problem found in a configuration, where it is, and how it reads.

    train_configs/x.toml:14: [training] step = 10: no such key; nearest: 'steps' (How many train steps to run)
    command line: --training.steps 0: must be at least 1 (How many train steps to run)

All problems of a load are collected first and raised together, in the order of the file.
"""

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .values import shorten, show

COMMAND_LINE = "command line"
_LATER_THAN_ANY_LINE = 10**9


@dataclass(frozen=True)
class Source:
    """Where a value was given: a line of a file, a file (line 0: none of its lines), or the command line."""

    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        return (f"{self.file}:{self.line}" if self.line else self.file) or COMMAND_LINE

    def label(self, key: str, value: Any) -> str:
        """The assignment as the user wrote it."""
        if not self.file:
            return f"--{key} {value if isinstance(value, str) else show(value)}"
        table, _, name = key.rpartition(".")
        text = shorten(show(value))
        return f"[{table}] {name} = {text}" if table else f"{name} = {text}"


@dataclass(frozen=True)
class Problem:
    """One line of the error message."""

    text: str
    source: Source = Source()

    def __str__(self) -> str:
        return f"{self.source}: {self.text}"


def quoted(summary: str) -> str:
    """The doc of a field in parentheses behind a message; nothing for a field without one."""
    return f" ({summary})" if summary else ""


def raise_if_any(problems: list[Problem]) -> None:
    """Raises one `ConfigError` with all problems, those of the file first, in the order of its lines."""
    if not problems:
        return
    ordered = sorted(problems, key=lambda problem: problem.source.line or _LATER_THAN_ANY_LINE)
    lines = list(dict.fromkeys(map(str, ordered)))
    if len(lines) == 1:
        raise ConfigError(lines[0])
    raise ConfigError(f"{len(lines)} problems in the configuration:\n  " + "\n  ".join(lines))

"""Line numbers of the tables, keys and list elements of a TOML text, which `tomllib` does not tell.

A small scanner that only walks: values are skipped, never interpreted, so `tomllib` stays the one authority
on what a text means. Parse with `tomllib` first; on a text it refuses, the scan may stop early or raise
`IndexError`.

    >>> locate('[training]\\nsteps = 10  # ten')
    {('training',): 1, ('training', 'steps'): 2}
"""

import os
import re
import tomllib
from bisect import bisect_left
from typing import Any

from ..errors import ConfigError
from ..files import read_text

Path = tuple[str | int, ...]

_BLANK = re.compile(r"[ \t]*")
_SPACE = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}\n#]*")
# Multi-line strings first: `""` is also an empty basic string. One or two quotes may precede the last three.
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}(?!")'
    r"|'''.*?'{3,5}(?!')"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)


def locate(text: str) -> dict[Path, int]:
    """Maps the path of everything in a valid TOML text to the 1-based line where it first appears.

    A path holds the keys from the root; an index stands for an element of a list or of an array of tables:
    `("training", "dataloader", "num_workers")`, `("data", "paths", 1)`.
    """
    return _Scanner(text.replace("\r\n", "\n")).document()


class _Scanner:
    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self.lines: dict[Path, int] = {}
        self.last_index: dict[Path, int] = {}
        """Arrays of tables: the index of the element that a header speaks of."""

    def document(self) -> dict[Path, int]:
        table: Path = ()
        while self.skip(_SPACE) < len(self.text):
            if self.text[self.position] == "[":
                table = self.header()
            else:
                self.assignment(table)
        return self.lines

    def header(self) -> Path:
        start, is_array = self.position, self.text.startswith("[[", self.position)
        self.position += 2 if is_array else 1
        keys, path = self.dotted_key(), ()
        for depth, key in enumerate(keys):
            path = (*path, key)
            self.mark(path, start)
            if is_array and depth == len(keys) - 1:
                self.last_index[path] = self.last_index.get(path, -1) + 1
            if path in self.last_index:
                path = (*path, self.last_index[path])
                self.mark(path, start)
        self.position += 2 if is_array else 1
        return path

    def assignment(self, table: Path) -> None:
        start = self.position
        for key in self.dotted_key():
            table = (*table, key)
            self.mark(table, start)
        self.position += 1  # the equals sign
        self.skip(_BLANK)
        self.value(table)

    def value(self, path: Path) -> None:
        first = self.text[self.position]
        if first == "[":
            self.array(path)
        elif first == "{":
            self.inline_table(path)
        else:
            self.skip(_STRING if first in "\"'" else _SCALAR)

    def array(self, path: Path) -> None:
        self.position += 1
        index = 0
        while self.text[self.skip(_SPACE)] != "]":
            self.mark((*path, index), self.position)
            self.value((*path, index))
            index += 1
            if self.text[self.skip(_SPACE)] == ",":
                self.position += 1
        self.position += 1

    def inline_table(self, path: Path) -> None:
        self.position += 1
        while self.text[self.skip(_SPACE)] != "}":
            self.assignment(path)
            if self.text[self.skip(_SPACE)] == ",":
                self.position += 1
        self.position += 1

    def dotted_key(self) -> list[str]:
        """Reads `a."b c".d` and the blanks around it."""
        keys = []
        while True:
            start = self.skip(_BLANK)
            quoted = self.text[start] in "\"'"
            self.skip(_STRING if quoted else _BARE_KEY)
            raw = self.text[start : self.position]
            keys.append(tomllib.loads(f"key = {raw}")["key"] if quoted else raw)
            if self.text[self.skip(_BLANK)] != ".":
                return keys
            self.position += 1

    def skip(self, pattern: re.Pattern[str]) -> int:
        """Moves past `pattern`; returns the new position."""
        match = pattern.match(self.text, self.position)
        if match is None:
            raise IndexError(f"nothing to skip at offset {self.position}")
        self.position = match.end()
        return self.position

    def mark(self, path: Path, position: int) -> None:
        self.lines.setdefault(path, bisect_left(self.newlines, position) + 1)


def read_toml(file: os.PathLike, expected: str) -> tuple[dict[str, Any], dict[Path, int]]:
    """The content of a TOML, and the line of each of its keys; raises ConfigError, which names what was expected."""
    try:
        text = read_text(file)
        content, lines = tomllib.loads(text), locate(text)
        # What it may name, a file or a text for another program, cannot hold one.
        if _holds_nul(content):
            raise ConfigError(f"{file}: a text holds a NUL character (\\u0000), which no path or name can")
        return content, lines
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; expected {expected}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start:,}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def _holds_nul(value: Any) -> bool:
    """Whether a text somewhere in tables and lists does."""
    if isinstance(value, dict):
        return any(map(_holds_nul, (*value, *value.values())))
    return any(map(_holds_nul, value)) if isinstance(value, list) else isinstance(value, str) and "\0" in value

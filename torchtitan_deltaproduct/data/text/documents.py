"""What text comes in: documents, records that are none, and the units of input that hold them."""

from dataclasses import dataclass
from typing import NamedTuple

Entry = tuple[int, str, str]
"""Of a reader: a place counted from 1, the text there, and the reason why there is none."""


class Document(NamedTuple):
    text: str
    origin: str
    """File (or dataset) it comes from."""


class BadRecord(NamedTuple):
    origin: str
    position: str
    """`line 17`, `row 17` or `item 17`; counted from 1."""
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}, {self.position}: {self.reason}"


@dataclass(frozen=True)
class Unit:
    """A piece of the input that one process reads in one go."""

    kind: str
    """`text`, `json`, `list` (of JSON), `csv`, `parquet` or `dataset`."""
    paths: tuple[str, ...]
    """One file, or for `text` several; for `dataset` its name, configuration and split."""
    start: int
    """First byte (`json`), row group (`parquet`) or row (`dataset`)."""
    stop: int
    """One past the last; -1 for the whole file."""
    size: int
    """Input bytes, for progress; estimated for `dataset`."""
    field: str
    """Column or key that holds the text; unused for `text`."""


def no_field(where: str, field: str, columns: list[str]) -> str:
    return f"{where} has no column {field!r}; it has: {', '.join(columns)}.\nName one with --text-field."


def text_of(value: object, field: str) -> tuple[str, str]:
    """The text of a field, and the reason why it has none."""
    if isinstance(value, bytes):
        try:
            return value.decode(), ""
        except UnicodeDecodeError:
            return "", "invalid UTF-8"
    if not isinstance(value, str):
        return "", f"field {field!r} is {type(value).__name__}, expected text"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return "", f"field {field!r} has a lone surrogate, which is not valid Unicode"
    return value, ""

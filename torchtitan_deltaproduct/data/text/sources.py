"""Where text comes from: files, folders and `datasets`, cut into units that are read independently.

    a.txt, b.py, ...              text: one document a file               unit: some files
    *.jsonl, *.json, ...          one JSON object a line                  unit: a range of bytes (packed: all)
    *.json that begins with [     one JSON object an item                 unit: the file
    *.csv                         one document a row below the header     unit: the file
    *.parquet, *.parq, *.pq       one document a row                      unit: a range of row groups
    a name or path of `datasets`  one document a row                      unit: a range of rows

    units = plan_units(["corpus/"], field="text", unit_bytes=1 << 26)
    for record in read_unit(units[0]): ...          # Document, or BadRecord: the file, the line, the reason

    records = open_records("corpus/", config="", split="train", field="text")      # or a name of `datasets`
    for record in records: ...                      # one after the other, for `kind = "streaming"` and evals
    state = records.state_dict()                    # load_state_dict(state): goes on with the next record

All but Parquet may be packed, as .gz or .zst. A document never spans two units, and the cut depends on the inputs
alone, so any number of processes may share them.
"""

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from torchtitan_deltaproduct.errors import DataError

from .arrow import DatasetRecords, check_no_split, is_saved_dataset, parquet_units, read_dataset, read_parquet
from .documents import BadRecord, Document, Entry, Unit, no_field, text_of
from .files import READ_ERRORS, UTF8_BOM, begins_as_list, kind_of, list_files, open_unpacked, warn_of_json

UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
CONVERTED = "; Latin-1, say, is converted by iconv -f latin1 -t utf-8"
UNIT_BYTES = 64 << 20
"""Of a unit of a local file: what a restart reads again at most."""


def plan_units(inputs: Iterable[str | Path], field: str, unit_bytes: int, written: Iterable[str] = ()) -> list[Unit]:
    """Cuts files and folders into units of about `unit_bytes`, in the order of the inputs; see `list_files`."""
    units: list[Unit] = []
    texts: list[str] = []
    gathered = 0
    for file in list_files(inputs, written):
        name, size = str(file), file.stat().st_size
        kind, packing = kind_of(file)
        if kind == "text":
            warn_of_json(file)
            texts.append(name)
            gathered += size
        if texts and (kind != "text" or gathered >= unit_bytes):
            units.append(Unit("text", tuple(texts), 0, -1, gathered, ""))
            texts, gathered = [], 0
        if kind == "csv" and csv_columns(name, field):
            units.append(Unit("csv", (name,), 0, -1, size, field))
        elif kind == "json" and (packing or begins_as_list(file)):
            units.append(Unit("list" if begins_as_list(file) else "json", (name,), 0, -1, size, field))
        elif kind == "json":
            ends = [(start, min(start + unit_bytes, size)) for start in range(0, size, unit_bytes)]
            units += [Unit("json", (name,), start, stop, stop - start, field) for start, stop in ends]
        elif kind == "parquet":
            units += parquet_units(file, field, unit_bytes)
    return units + ([Unit("text", tuple(texts), 0, -1, gathered, "")] if texts else [])


def read_unit(unit: Unit) -> Iterator[Document | BadRecord]:
    """All records of a unit in order; those that cannot be read as `BadRecord`."""
    for name in unit.paths[:1] if unit.kind == "dataset" else unit.paths:
        yield from _read_file(unit, name)


def _read_file(unit: Unit, name: str) -> Iterator[Document | BadRecord]:
    (word, reader), packing = READERS[unit.kind], kind_of(name)[1]
    place, before = 0, None
    try:
        for place, text, reason in reader(unit, name):
            if not reason:
                yield Document(text, name)
            else:
                if before is None:
                    before = _lines_before(name, unit.start) if unit.kind == "json" else 0
                yield BadRecord(name, f"{word} {before + place}", reason)
    except READ_ERRORS as error:
        if not packing:
            raise
        yield BadRecord(name, f"{word} {place + 1}", f"damaged {packing}, the rest is lost ({error})")


def _read_text(unit: Unit, name: str) -> Iterator[Entry]:
    with open_unpacked(name) as file:
        raw = file.read()
    no_text = raw.startswith(UTF16_BOMS) or raw.count(0) > len(raw) // 8
    line, text, reason = (1, "", "UTF-16 text, or no text at all; expected UTF-8") if no_text else _decoded(raw)
    yield line, text, reason + CONVERTED * (reason == "invalid UTF-8")


def _decoded(raw: bytes) -> Entry:
    """The text of a file, or the line where it is not UTF-8."""
    try:
        return 1, raw.removeprefix(UTF8_BOM).decode(), ""
    except UnicodeDecodeError as error:
        return error.object.count(b"\n", 0, error.start) + 1, "", "invalid UTF-8"


def _read_json(unit: Unit, name: str) -> Iterator[Entry]:
    for number, line in enumerate(lines_of(unit), start=1):
        if line.strip():
            yield number, *_text_of_line(line, unit.field)


def lines_of(unit: Unit) -> Iterator[bytes]:
    """The lines that begin in [start, stop) of a file."""
    with open_unpacked(unit.paths[0]) as file:
        if unit.stop == -1:
            yield from file
            return
        if unit.start:
            # A line that began before the unit is the previous unit's.
            file.seek(unit.start - 1)
            file.readline()
        position = file.tell()
        while position < unit.stop and (line := file.readline()):
            position += len(line)
            yield line


def _lines_before(name: str, position: int) -> int:
    """Lines that begin in [0, position): those of the units before; counted only when a line has to be named."""
    newlines, last, left = 0, b"\n", position
    with open(name, "rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            newlines, last, left = newlines + block.count(b"\n"), block[-1:], left - len(block)
    return newlines + (last != b"\n")


def _text_of_line(line: bytes, field: str) -> tuple[str, str]:
    try:
        return _text_of_object(json.loads(line.removeprefix(UTF8_BOM).decode()), field)
    except UnicodeDecodeError:
        return "", "invalid UTF-8"
    except (ValueError, RecursionError) as error:
        return "", f"invalid JSON ({error})"


def _text_of_object(record: object, field: str) -> tuple[str, str]:
    if not isinstance(record, dict):
        return "", f"expected a JSON object, found {type(record).__name__}"
    if field not in record:
        return "", f"no field {field!r}; fields: {', '.join(list(record)[:8])}"
    return text_of(record[field], field)


def _read_list(unit: Unit, name: str) -> Iterator[Entry]:
    with open_unpacked(name) as file:
        line, text, reason = _decoded(file.read())
    try:
        items = [] if reason else json.loads(text)
    except (ValueError, RecursionError) as error:
        line, reason = getattr(error, "lineno", 1), f"invalid JSON ({error})"
    if reason:
        yield 1, "", f"{reason} in line {line}: all of the list is lost"
        return
    for number, item in enumerate(items, start=1):
        yield number, *_text_of_object(item, unit.field)


def _csv_rows(file: BinaryIO):
    """Rows of a CSV file; bytes that are not UTF-8 are lone surrogates in them."""
    csv.field_size_limit(sys.maxsize)
    return csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""), strict=True)


def csv_columns(name: str, field: str) -> list[str]:
    """The header of a CSV file, [] of an empty one; DataError if it does not read, or has not one column `field`."""
    try:
        with open_unpacked(name) as file:
            columns = next(_csv_rows(file), [])
        "".join(columns).encode()
    except (*READ_ERRORS, csv.Error, UnicodeEncodeError) as error:
        raise DataError(f"{name} cannot be read as CSV ({error}).\nRemove it or copy it again.") from None
    if columns and field not in columns:
        raise DataError(no_field(name, field, columns))
    if columns.count(field) > 1:
        raise DataError(f"{name} has {columns.count(field)} columns {field!r}: which one is not known.")
    return columns


def _read_csv(unit: Unit, name: str) -> Iterator[Entry]:
    columns = csv_columns(name, unit.field)
    column = columns.index(unit.field)
    with open_unpacked(name) as file:
        rows = _csv_rows(file)
        next(rows)
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, "", f"invalid CSV ({error})"
                continue
            if row and len(row) != len(columns):
                yield line, "", f"{len(row)} fields, and {len(columns)} columns in the header"
            elif row:
                yield line, *text_of(row[column].encode(errors="surrogateescape"), unit.field)


READERS = {
    "text": ("line", _read_text), "json": ("line", _read_json), "list": ("item", _read_list),
    "csv": ("line", _read_csv), "parquet": ("row", read_parquet), "dataset": ("row", read_dataset),
}  # fmt: skip
"""What a place in a file is called, and what reads it."""


def open_records(name: str, config: str, split: str, field: str) -> "LocalRecords | DatasetRecords":
    """The records of files, a folder, or a dataset of `datasets`; DataError if there are none, or without `field`."""
    if Path(name).exists() and not is_saved_dataset(name):
        check_no_split(name, split, config)
        return LocalRecords(name, field)
    return DatasetRecords(name, config, split, field)


class LocalRecords:
    """The records of a file or folder, as `prepare` reads them. Its state is the unit and the records read of it."""

    def __init__(self, name: str, field: str):
        try:
            self.units = plan_units([name], field, UNIT_BYTES)
        except DataError as error:
            raise DataError(f"The dataset {name!r} cannot be opened: {error}") from None
        self.unit = self.records = 0
        first = next((unit for unit in self.units if unit.kind == "json"), None)
        columns = _columns(first) if first else []
        if columns and field not in columns:
            raise DataError(no_field(first.paths[0], field, columns))

    def state_dict(self) -> dict[str, int]:
        return {"unit": self.unit, "records": self.records}

    def load_state_dict(self, state: dict[str, int] | None) -> None:
        self.unit, self.records = (state["unit"], state["records"]) if state else (0, 0)

    def __iter__(self) -> Iterator[Document | BadRecord]:
        while self.unit < len(self.units):
            for record in islice(read_unit(self.units[self.unit]), self.records, None):
                self.records += 1
                yield record
            self.unit, self.records = self.unit + 1, 0


def _columns(unit: Unit) -> list[str]:
    """The fields of the first JSON object in a unit; none if there is no object near its start."""
    # What is damaged is named when it is read.
    with suppress(*READ_ERRORS):
        for line in islice(lines_of(unit), 256):
            with suppress(ValueError, RecursionError):
                if isinstance(record := json.loads(line.removeprefix(UTF8_BOM)), dict):
                    return list(record)
    return []

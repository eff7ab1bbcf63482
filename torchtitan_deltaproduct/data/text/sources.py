"""Where text comes from: files, folders and `datasets`, cut into units that are read independently.

    a.txt, b.py, ...              text: one document a file               unit: some files
    *.jsonl, *.json, ...          one JSON object a line                  unit: a range of bytes (packed: all)
    *.json that begins with [     one JSON object an item                 unit: the file
    *.csv                         one document a row below the header     unit: the file
    *.parquet, *.parq, *.pq       one document a row                      unit: a range of row groups
    a name or path of `datasets`  one document a row                      unit: a range of rows

    units = plan_units(["corpus/"], field="text", unit_bytes=1 << 26)
    for record in read_unit(units[0]): ...          # Document, or BadRecord: the file, the line, the reason

All but Parquet may be packed, as .gz or .zst.
A document never spans two units, and the cut depends on the inputs alone, so any number of processes may
share them.
"""

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from torchtitan_deltaproduct.errors import ConfigError, DataError, UserError, first_line

from .files import READ_ERRORS, SUFFIXES, UTF8_BOM, begins_as_list, kind_of, list_files, open_unpacked, warn_of_json

UTF16_BOMS, NEWLINE = (b"\xff\xfe", b"\xfe\xff"), b"\n"
ROWS_AT_ONCE = 256


class Document(NamedTuple):
    text: str
    origin: str
    """File (or dataset) it comes from."""


class BadRecord(NamedTuple):
    origin: str
    position: str
    """`line 17`, or `row 17`; counted from 1."""
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}, {self.position}: {self.reason}"


@dataclass(frozen=True)
class Unit:
    """A piece of the input that one process reads in one go.

    Attributes:
        kind: `text`, `json`, `list` (of JSON), `csv`, `parquet` or `dataset`.
        paths: one file, or for `text` several; for `dataset` its name, configuration and split.
        start: first byte (`json`), row group (`parquet`) or row (`dataset`).
        stop: one past the last; -1 for the whole file.
        size: input bytes, for progress; estimated for `dataset`.
        field: column or key that holds the text; unused for `text`.
    """

    kind: str
    paths: tuple[str, ...]
    start: int
    stop: int
    size: int
    field: str


def plan_units(inputs: Iterable[str | Path], field: str, unit_bytes: int) -> list[Unit]:
    """Cuts files and folders into units of about `unit_bytes`, in the order of the inputs."""
    units: list[Unit] = []
    texts: list[tuple[str, int]] = []
    gathered = 0
    for file in list_files(inputs):
        name, size = str(file), file.stat().st_size
        kind, packing = kind_of(file)
        if kind == "text":
            warn_of_json(file)
            texts.append((name, size))
            gathered += size
            if gathered < unit_bytes:
                continue
        units += _text_unit(texts)
        gathered = 0
        if kind == "csv":
            csv_columns(name, field)
            units.append(Unit("csv", (name,), 0, -1, size, field))
        elif kind == "json" and begins_as_list(file):
            units.append(Unit("list", (name,), 0, -1, size, field))
        elif kind == "json" and packing:
            units.append(Unit("json", (name,), 0, -1, size, field))
        elif kind == "json":
            for start in range(0, size, unit_bytes):
                stop = min(start + unit_bytes, size)
                units.append(Unit("json", (name,), start, stop, stop - start, field))
        elif kind == "parquet":
            units += _parquet_units(file, field, unit_bytes)
    return units + _text_unit(texts)


def plan_dataset_units(name: str, config: str, split: str, field: str, unit_rows: int = 20_000) -> list[Unit]:
    """Cuts a dataset of the hub, or a local one that `datasets` can read, into ranges of rows."""
    dataset = open_dataset(name, config, split, streaming=False)
    check_column(f"dataset {name}", field, dataset.data.schema)
    row_bytes = max(1, (dataset.data.nbytes if dataset.data is not None else 0) // max(1, len(dataset)))
    return [
        Unit("dataset", (name, config, split), a, b, (b - a) * row_bytes, field)
        for a in range(0, len(dataset), unit_rows)
        for b in [min(a + unit_rows, len(dataset))]
    ]


def read_unit(unit: Unit) -> Iterator[Document | BadRecord]:
    """All records of a unit in order; those that cannot be read as `BadRecord`."""
    return READERS[unit.kind](unit)


def is_saved_dataset(path: str | Path) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`."""
    return any(Path(path, name).is_file() for name in ("dataset_dict.json", "state.json"))


def check_no_split(name: str, split: str, config: str = "") -> None:
    """Raises ConfigError if a split or configuration is asked of local data, which has none."""
    if split != "train" or config:
        asked = f"configuration {config!r}" if config else f"split {split!r}"
        raise ConfigError(f"{asked} of {name}: only a dataset of `datasets` has that; name the files to be read")


def open_dataset(name: str, config: str, split: str, streaming: bool):
    """A split of a dataset: `datasets.load_dataset`, or for local data whatever fits the path.

    Args:
        name: a hub name, a data file (JSON lines, Parquet, text), a folder of such files, or a folder
            written by `save_to_disk`.
        config: configuration (subset) name; empty for the default.
        split: such as `train`.
        streaming: an `IterableDataset`, which downloads what it reads, instead of a `Dataset`.
    """
    import datasets

    path = Path(name)
    try:
        if is_saved_dataset(path):
            dataset = datasets.load_from_disk(name)
            if isinstance(dataset, datasets.DatasetDict):
                if split not in dataset:
                    raise DataError(f"{name} has no split {split!r}; it has: {', '.join(dataset)}.")
                dataset = dataset[split]
            else:
                check_no_split(name, split)
            return dataset.to_iterable_dataset() if streaming else dataset
        if path.is_file():
            kind, _ = kind_of(path)
            if kind == "unreadable" or (kind == "text" and ".txt" not in path.name.lower()):
                raise DataError(f"{name} is not a data file that can be read: expected .txt, {', '.join(SUFFIXES)}.")
            check_no_split(name, "train", config)
            return datasets.load_dataset(kind, data_files=[name], split=split, streaming=streaming)
        return datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # a damaged folder of `save_to_disk` raises nearly anything
        raise DataError(
            f"The dataset {name!r} (configuration {config or 'default'!r}, split {split!r}) "
            f"cannot be opened: {first_line(error)}\n"
            "Check the name; offline, a hub dataset must have been downloaded before."
        ) from None


def _text_unit(texts: list[tuple[str, int]]) -> list[Unit]:
    """The unit of the files gathered so far, which it takes out of the list."""
    if not texts:
        return []
    unit = Unit("text", tuple(name for name, _ in texts), 0, -1, sum(size for _, size in texts), "")
    texts.clear()
    return [unit]


def _parquet_units(file: Path, field: str, unit_bytes: int) -> list[Unit]:
    parquet = _open_parquet(str(file))
    check_column(str(file), field, parquet.schema_arrow)
    metadata = parquet.metadata
    groups = [metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups)]
    units, start = [], 0
    for stop in range(1, len(groups) + 1):
        if sum(groups[start:stop]) >= unit_bytes or stop == len(groups):
            units.append(Unit("parquet", (str(file),), start, stop, sum(groups[start:stop]), field))
            start = stop
    return units


@lru_cache(maxsize=1)
def _open_parquet(name: str):
    import pyarrow
    import pyarrow.parquet

    try:
        # Not by the library's own reading of a path, which must be UTF-8. The file is closed with what reads it.
        file = pyarrow.parquet.ParquetFile(open(name, "rb"))  # noqa: SIM115
        file.schema_arrow.names  # noqa: B018  read here, where a damaged name is told
        return file
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, IndexError) as error:
        raise DataError(f"{name} cannot be read as Parquet ({error}).\nRemove it or copy it again.") from None


def no_field(where: str, field: str, columns: list[str]) -> str:
    return f"{where} has no column {field!r}; it has: {', '.join(columns)}.\nName one with --text-field."


def check_column(where: str, field: str, schema) -> None:
    """Raises DataError unless an Arrow schema has one column of that name, and its values can be text."""
    from pyarrow import types

    if field not in schema.names:
        raise DataError(no_field(where, field, schema.names))
    if schema.names.count(field) > 1:
        raise DataError(f"{where} has {schema.names.count(field)} columns {field!r}: which one is not known.")
    kind = found = schema.field(field).type
    kind = getattr(kind, "storage_type", kind)
    kind = kind.value_type if types.is_dictionary(kind) else kind
    # A column of nulls may be that of a file in which no row has a text.
    if not (kind in _text_types() or types.is_null(kind) or types.is_fixed_size_binary(kind)):
        raise DataError(f"Column {field!r} of {where} holds {found}, expected text.\nName another with --text-field.")


@lru_cache(maxsize=1)
def _text_types() -> dict:
    """Arrow's types of text, and the type of the bytes of each."""
    import pyarrow as pa

    kinds = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    return kinds | {kind: kind for kind in kinds.values()}


def _read_texts(unit: Unit) -> Iterator[Document | BadRecord]:
    for name in unit.paths:
        if isinstance(raw := _whole(name), BadRecord):
            yield raw
            continue
        if raw.startswith(UTF16_BOMS) or raw.count(0) > len(raw) // 8:
            yield BadRecord(name, "line 1", "UTF-16 text, or no text at all; expected UTF-8")
            continue
        try:
            yield Document(raw.decode(), name)
        except UnicodeDecodeError as error:
            yield _not_utf8(name, raw, error)


def _whole(name: str) -> bytes | BadRecord:
    """What is in a file, without a mark of UTF-8; an unpacked one that cannot be read is an error."""
    packing = kind_of(name)[1]
    try:
        with open_unpacked(name) as file:
            return file.read().removeprefix(UTF8_BOM)
    except READ_ERRORS as error:
        if not packing:
            raise
        return BadRecord(name, "line 1", f"damaged {packing} ({error})")


def _not_utf8(name: str, raw: bytes, error: UnicodeDecodeError) -> BadRecord:
    return BadRecord(name, f"line {raw.count(NEWLINE, 0, error.start) + 1}", "invalid UTF-8")


def _read_list(unit: Unit) -> Iterator[Document | BadRecord]:
    name = unit.paths[0]
    if isinstance(raw := _whole(name), BadRecord):
        yield raw
        return
    try:
        items = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        yield _not_utf8(name, raw, error)
        return
    except (ValueError, RecursionError) as error:
        yield BadRecord(name, f"line {getattr(error, 'lineno', 1)}", f"invalid JSON, all of the list is lost ({error})")
        return
    for number, item in enumerate(items, start=1):
        text, reason = _text_of_object(item, unit.field)
        yield BadRecord(name, f"item {number}", reason) if reason else Document(text, name)


def _csv_rows(file: BinaryIO) -> "csv.reader":
    """Rows of a CSV file; bytes that are not UTF-8 are lone surrogates in them."""
    csv.field_size_limit(sys.maxsize)
    return csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""), strict=True)


def csv_columns(name: str, field: str) -> list[str]:
    """The header of a CSV file; DataError if it has none, or no column `field`."""
    try:
        with open_unpacked(name) as file:
            columns = next(_csv_rows(file), [])
        "".join(columns).encode()
    except (*READ_ERRORS, csv.Error, UnicodeEncodeError) as error:
        raise DataError(f"{name} cannot be read as CSV ({error}).\nRemove it or copy it again.") from None
    if field not in columns:
        raise DataError(no_field(name, field, columns))
    if columns.count(field) > 1:
        raise DataError(f"{name} has {columns.count(field)} columns {field!r}: which one is not known.")
    return columns


def _read_csv(unit: Unit) -> Iterator[Document | BadRecord]:
    name, (columns, packing) = unit.paths[0], (csv_columns(unit.paths[0], unit.field), kind_of(unit.paths[0])[1])
    column = columns.index(unit.field)
    with open_unpacked(name) as file:
        rows = _csv_rows(file)
        next(rows)
        while True:
            line = f"line {rows.line_num + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRecord(name, line, f"invalid CSV ({error})")
                continue
            except READ_ERRORS as error:
                yield BadRecord(name, line, f"damaged {packing or 'file'}, the rest is lost ({error})")
                return
            if row and len(row) != len(columns):
                yield BadRecord(name, line, f"{len(row)} fields, and {len(columns)} columns in the header")
            elif row:
                text, reason = _checked(row[column].encode(errors="surrogateescape"), unit.field)
                yield BadRecord(name, line, reason) if reason else Document(text, name)


def _read_json(unit: Unit) -> Iterator[Document | BadRecord]:
    """Lines that begin in [start, stop). Line numbers are found by counting only when one has to be named."""
    name, before = unit.paths[0], None
    for number, line in enumerate(lines_of(unit), start=1):
        if isinstance(line, BadRecord):
            yield line
            return
        text, reason = _text_of_line(line, unit.field)
        if not reason:
            yield Document(text, name)
        elif reason != "blank":
            before = _lines_before(name, unit.start) if before is None else before
            yield BadRecord(name, f"line {before + number}", reason)


def lines_of(unit: Unit) -> Iterator[bytes | BadRecord]:
    """The lines that begin in a unit of JSON; a BadRecord where a packed file is damaged."""
    name = unit.paths[0]
    if unit.stop == -1:
        number = 0
        try:
            with open_unpacked(name) as file:
                for number, line in enumerate(file, start=1):  # noqa: B007 (used below)
                    yield line
        except READ_ERRORS as error:
            yield BadRecord(name, f"line {number + 1}", f"damaged {kind_of(name)[1]}, the rest is lost ({error})")
        return
    with open(name, "rb") as file:
        if unit.start:
            # A line that began before the unit is the previous unit's.
            file.seek(unit.start - 1)
            file.readline()
        position = file.tell()
        while position < unit.stop and (line := file.readline()):
            position += len(line)
            yield line


def _lines_before(name: str, position: int) -> int:
    """Lines that begin in [0, position): those of the units before."""
    newlines, last, left = 0, b"\n", position
    with open(name, "rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            newlines, last, left = newlines + block.count(b"\n"), block[-1:], left - len(block)
    return newlines + (last != b"\n")


def _text_of_line(line: bytes, field: str) -> tuple[str, str]:
    """A JSON line's text, and the reason why it has none."""
    if not line.strip():
        return "", "blank"
    try:
        record = json.loads(line.removeprefix(UTF8_BOM).decode())
    except UnicodeDecodeError:
        return "", "invalid UTF-8"
    except (ValueError, RecursionError) as error:
        return "", f"invalid JSON ({error})"
    return _text_of_object(record, field)


def _text_of_object(record: object, field: str) -> tuple[str, str]:
    """The text in a JSON object, and the reason why it has none."""
    if not isinstance(record, dict):
        return "", f"expected a JSON object, found {type(record).__name__}"
    if field not in record:
        return "", f"no field {field!r}; fields: {', '.join(list(record)[:8])}"
    return _checked(record[field], field)


def _checked(value, field: str) -> tuple[str, str]:
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


def _read_parquet(unit: Unit) -> Iterator[Document | BadRecord]:
    import pyarrow

    name = unit.paths[0]
    parquet = _open_parquet(name)
    row = sum(parquet.metadata.row_group(g).num_rows for g in range(unit.start))
    batches = parquet.iter_batches(ROWS_AT_ONCE, row_groups=list(range(unit.start, unit.stop)), columns=[unit.field])
    try:
        for batch in batches:
            # Of the column `doc.text` and a field `text` of `doc`, which come together, it is the column.
            values = column_values(batch.column(unit.field))
            yield from checked_rows(values, name, row, unit.field)
            row += len(values)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, IndexError) as error:
        yield BadRecord(name, f"row {row + 1}", f"damaged Parquet, the rest of the row groups is lost ({error})")


def column_values(column) -> list[bytes | None]:
    """The bytes of the texts in an Arrow column, which need not be UTF-8.

    Raises:
        pyarrow.ArrowInvalid, IndexError: the column is damaged.
    """
    import pyarrow

    if isinstance(column, pyarrow.ChunkedArray):
        return [value for chunk in column.iterchunks() for value in column_values(chunk)]
    column = getattr(column, "storage", column)
    if pyarrow.types.is_dictionary(column.type):
        values = column_values(column.dictionary)
        return [None if index is None else values[index] for index in column.indices.to_pylist()]
    column = column.cast(_text_types().get(column.type, column.type))
    # Nothing else looks at the offsets of a file that is mapped into memory.
    column.validate(full=True)
    return column.to_pylist()


def _read_dataset(unit: Unit) -> Iterator[Document | BadRecord]:
    import pyarrow

    rows = _cached_dataset(*unit.paths).with_format("arrow")
    for first in range(unit.start, unit.stop, ROWS_AT_ONCE):
        stop = min(first + ROWS_AT_ONCE, unit.stop)
        try:
            values = column_values(rows[first:stop][unit.field])
        except (OSError, pyarrow.ArrowException, IndexError) as error:
            yield BadRecord(unit.paths[0], f"row {first + 1}", f"damaged, rows to {stop} are lost ({error})")
            continue
        yield from checked_rows(values, unit.paths[0], first, unit.field)


@lru_cache(maxsize=1)
def _cached_dataset(name: str, config: str, split: str):
    return open_dataset(name, config, split, streaming=False)


def checked_rows(values: Iterable, name: str, first: int, field: str) -> Iterator[Document | BadRecord]:
    for row, value in enumerate(values, start=first + 1):
        text, reason = _checked(value, field)
        yield BadRecord(name, f"row {row}", reason) if reason else Document(text, name)


READERS = {
    "text": _read_texts,
    "json": _read_json,
    "list": _read_list,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "dataset": _read_dataset,
}

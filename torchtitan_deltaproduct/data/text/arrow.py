"""Text in Arrow's tables: Parquet files, and the datasets that `datasets` reads."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from torchtitan_deltaproduct.errors import ConfigError, DataError, UserError, first_line

from .documents import BadRecord, Document, Entry, Unit, no_field, text_of
from .files import SUFFIXES, kind_of

ROWS_AT_ONCE = 256


def parquet_units(file: Path, field: str, unit_bytes: int) -> list[Unit]:
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


def plan_dataset_units(name: str, config: str, split: str, field: str, unit_rows: int = 20_000) -> list[Unit]:
    """Cuts a dataset of the hub, or a local one that `datasets` can read, into ranges of rows."""
    dataset = open_dataset(name, config, split, streaming=False)
    check_column(f"dataset {name}", field, dataset.data.schema)
    rows = len(dataset)
    row_bytes = max(1, (dataset.data.nbytes if dataset.data is not None else 0) // max(1, rows))
    ends = [(first, min(first + unit_rows, rows)) for first in range(0, rows, unit_rows)]
    return [Unit("dataset", (name, config, split), a, b, (b - a) * row_bytes, field) for a, b in ends]


def is_saved_dataset(path: str | Path) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`."""
    return any(Path(path, name).is_file() for name in ("dataset_dict.json", "state.json"))


def check_no_split(name: str, split: str, config: str = "") -> None:
    """Raises ConfigError if a split or configuration is asked of local data, which has none."""
    if split != "train" or config:
        asked = f"configuration {config!r}" if config else f"split {split!r}"
        raise ConfigError(f"{asked} of {name}: only a dataset of `datasets` has that; name the files to be read")


def open_dataset(name: str, config: str, split: str, streaming: bool):
    """A split of a dataset: a name on the hub, a data file, a folder of such, or one written by `save_to_disk`.

    `streaming`: an `IterableDataset`, which downloads what it reads, instead of a `Dataset`.
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


def check_column(where: str, field: str, schema) -> None:
    """Raises DataError unless an Arrow schema has one column of that name, and its values can be text."""
    from pyarrow import types

    if field not in schema.names:
        raise DataError(no_field(where, field, schema.names))
    if schema.names.count(field) > 1:
        raise DataError(f"{where} has {schema.names.count(field)} columns {field!r}: which one is not known.")
    given = schema.field(field).type
    kind = getattr(given, "storage_type", given)
    kind = kind.value_type if types.is_dictionary(kind) else kind
    # A column of nulls may be that of a file in which no row has a text.
    if not (kind in _text_types() or types.is_null(kind) or types.is_fixed_size_binary(kind)):
        raise DataError(f"Column {field!r} of {where} holds {given}, expected text.\nName another with --text-field.")


@lru_cache(maxsize=1)
def _text_types() -> dict:
    """Arrow's types of text, and the type of the bytes of each."""
    import pyarrow as pa

    kinds = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    return kinds | {kind: kind for kind in kinds.values()}


def column_values(column) -> list[bytes | None]:
    """The bytes of the texts in an Arrow column, which need not be UTF-8; a damaged one raises nearly anything."""
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


def read_parquet(unit: Unit, name: str) -> Iterator[Entry]:
    import pyarrow

    parquet = _open_parquet(name)
    row = sum(parquet.metadata.row_group(g).num_rows for g in range(unit.start))
    batches = parquet.iter_batches(ROWS_AT_ONCE, row_groups=list(range(unit.start, unit.stop)), columns=[unit.field])
    try:
        for batch in batches:
            # Of the column `doc.text` and a field `text` of `doc`, which come together, it is the column.
            for row, value in enumerate(column_values(batch.column(unit.field)), start=row + 1):  # noqa: B020
                yield row, *text_of(value, unit.field)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, IndexError) as error:
        yield row + 1, "", f"damaged Parquet, the rest of the row groups is lost ({error})"


def read_dataset(unit: Unit, name: str) -> Iterator[Entry]:
    import pyarrow

    rows = _cached_dataset(*unit.paths).with_format("arrow")
    for first in range(unit.start, unit.stop, ROWS_AT_ONCE):
        stop = min(first + ROWS_AT_ONCE, unit.stop)
        try:
            values = column_values(rows[first:stop][unit.field])
        except (OSError, pyarrow.ArrowException, IndexError) as error:
            yield first + 1, "", f"damaged, rows to {stop} are lost ({error})"
            continue
        for row, value in enumerate(values, start=first + 1):
            yield row, *text_of(value, unit.field)


@lru_cache(maxsize=1)
def _cached_dataset(name: str, config: str, split: str):
    return open_dataset(name, config, split, streaming=False)


class DatasetRecords:
    """The rows of a dataset, downloaded as they are read. Its state is that of `datasets`, and the rows before."""

    def __init__(self, name: str, config: str, split: str, field: str):
        self.name, self.field, self.row = name, field, 0
        # As Arrow tables: a text that is not UTF-8 is then a bad record, and not the end.
        self.dataset = open_dataset(name, config, split, streaming=True).with_format("arrow")

    def state_dict(self) -> dict:
        return {"dataset": self.dataset.state_dict(), "row": self.row}

    def load_state_dict(self, state: dict | None) -> None:
        self.dataset.load_state_dict(state["dataset"] if state else None)
        self.row = state["row"] if state else 0

    def __iter__(self) -> Iterator[Document | BadRecord]:
        import datasets
        import pyarrow

        try:
            for table in self.dataset:
                check_column(f"dataset {self.name}", self.field, table.schema)
                for value in column_values(table.column(self.field)):
                    text, reason = text_of(value, self.field)
                    self.row += 1
                    yield BadRecord(self.name, f"row {self.row}", reason) if reason else Document(text, self.name)
        except (OSError, ValueError, IndexError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"dataset {self.name} cannot be read on after row {self.row}: {error}") from None

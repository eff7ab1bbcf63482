"""Text record after record, from any place on: what `kind = "streaming"` trains on, and evals look through.

records = open_records("corpus/", config="", split="train", field="text")      # or a name of `datasets`
for record in records: ...               # Document, or BadRecord: what cannot be read is named and passed over
state = records.state_dict()             # load_state_dict(state): goes on with the next record
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from torchtitan_deltaproduct.errors import DataError

from .arrow import ROWS_AT_ONCE, check_column, check_no_split, column_values, is_saved_dataset, open_dataset
from .documents import BadRecord, Document, Unit, no_field, text_of
from .files import READ_ERRORS, UTF8_BOM
from .sources import lines_of, plan_units, read_unit

UNIT_BYTES = 64 << 20
"""Of a unit of a local file: what a restart reads again at most."""


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


def _columns(unit: Unit) -> list[str]:
    """The fields of the first JSON object in a unit; none if there is no object near its start."""
    # What is damaged is named when it is read.
    with suppress(*READ_ERRORS):
        for line in islice(lines_of(unit), ROWS_AT_ONCE):
            with suppress(ValueError, RecursionError):
                if isinstance(record := json.loads(line.removeprefix(UTF8_BOM)), dict):
                    return list(record)
    return []

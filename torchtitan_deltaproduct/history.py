"""Record files (JSON lines) of any length, read in a time that does not grow with them: head, tail, single steps.

    records, whole = overview(run / "metrics.jsonl", validated_every=1000)      # enough to draw, of years of training
    newest = ends(run / "events.jsonl", head=0)[-1]

`metrics.jsonl` is ordered by step, which lets one find a step by halving. Needs only the standard library.
"""

import errno
import heapq
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .files import read_bytes

BLOCK = 1 << 16
"""Bytes read at once from an end."""
WHOLE = 1 << 20
"""Bytes up to which a file is read whole."""
NUMBERS = {int, float, bool, type(None)}
"""Types of JSON's numbers, and null."""
VALIDATIONS, AROUND = 128, 1 << 12
"""Of a longer file: validations looked up, and bytes read at each place, of which there are `WHOLE / AROUND`."""


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None for one that a kill, a full disk or a flipped bit made something else."""
    try:
        record = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def parse(data: bytes, word: bytes = b"") -> Iterator[dict[str, Any]]:
    """The JSON objects of some lines that hold a word; a line that does not parse is left out."""
    return (record for record in map(parse_line, (x for x in data.splitlines() if word in x)) if record is not None)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; [] without a file. A line that does not parse is left out."""
    try:
        return list(parse(read_bytes(path)))
    except OSError:
        return []


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """All records of a run's metrics.jsonl, `{"step": 20, "loss": 5.1, ...}`; a damaged line is left out."""
    return list(filter(of_a_step, read_jsonl(Path(run, "metrics.jsonl"))))


def of_a_step(record: dict[str, Any]) -> bool:
    """Whether a record is one of metrics.jsonl: `{"step": 20, "loss": 5.1, ...}`, numbers and nulls."""
    return type(record.get("step")) is int and NUMBERS.issuperset(map(type, record.values()))


def open_records(path: Path) -> BinaryIO:
    """Opens a regular file to read.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    # A pipe that nobody writes to would block the opening without O_NONBLOCK, which regular files ignore.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def part(file: BinaryIO, start: int, size: int) -> tuple[int, bytes]:
    """The whole lines that begin in `size` bytes from `start`, or just behind it, and where they begin."""
    data = os.pread(file.fileno(), size + AROUND, start)
    # A line that begins at `start` is told by the end of the one before.
    first = 0 if start == 0 or os.pread(file.fileno(), 1, start - 1) == b"\n" else data.find(b"\n") + 1
    last = data.find(b"\n", size) + 1 or len(data)
    return start + first, data[first:last]


def ends(path: Path, head: int = BLOCK, tail: int = BLOCK) -> list[dict[str, Any]]:
    """The records in the first `head` and the last `tail` bytes of a file, in order, each once; [] without a file."""
    try:
        with open_records(path) as file:
            size = os.fstat(file.fileno()).st_size
            return list(in_order(file, [(0, head), (size - tail, tail)]))
    except OSError:
        return []


def blocks_from_the_end(file: BinaryIO) -> Iterator[tuple[int, list[bytes]]]:
    """The lines of a file with their ends, in blocks, the last block first: where each begins, and its lines."""
    end, size = os.fstat(file.fileno()).st_size, BLOCK
    while end > 0:
        start = max(end - size, 0)
        data = os.pread(file.fileno(), end - start, start)
        cut = data.find(b"\n") + 1 if start else 0
        if start and cut in (0, len(data)):
            # A line longer than the block.
            size *= 2
            continue
        yield start + cut, data[cut:].splitlines(keepends=True)
        end, size = start + cut, BLOCK


def overview(path: Path, validated_every: int | None, limit: int = WHOLE) -> tuple[list[dict[str, Any]], bool]:
    """Records of a metrics.jsonl in its order: all of a short file; of a long one its end and places all over it.

    Args:
        path: the file; one that is not there has no records.
        validated_every: steps between validations, whose records are looked up, the newest and others evenly, up to
            `VALIDATIONS`; None: only those met by chance.
        limit: bytes up to which a file is read whole, and of a longer one about as many.

    Returns:
        The records, and whether they are all there are.
    """
    try:
        with open_records(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= limit:
                return list(filter(of_a_step, parse(os.pread(file.fileno(), size, 0)))), True
            points = limit // AROUND
            places = [(size * i // points, AROUND) for i in range(points)] + [(size - limit // 4, limit // 4)]
            newest = filter(of_a_step, in_order(file, [(size - BLOCK, BLOCK)]))
            last = max((record["step"] for record in newest), default=0)
            records = list(filter(of_a_step, in_order(file, places)))
            if validated_every:
                steps = range(last // validated_every * validated_every, -1, -validated_every)
                steps = steps[:: -(-len(steps) // VALIDATIONS)]
                validations = in_order(
                    file, [(place_of(file, size, step, last), 3 * AROUND) for step in steps], b"validation_"
                )
                met = {record["step"] for record in records if "validation_loss" in record}
                others = [record for record in filter(of_a_step, validations) if record["step"] not in met]
                records = list(heapq.merge(records, others, key=lambda record: record["step"]))
            return records, False
    except OSError:
        return [], True


def place_of(file: BinaryIO, size: int, step: int, last: int) -> int:
    """A place at most `AROUND` bytes before the first record of a step.

    It is looked for where it would be if all lines were as long, a little to the side that is still far, and further
    each time that it turns out to be further: in few looks where lines are alike, in the logarithm of them at worst.

    Args:
        file: the file.
        size: of it, in bytes.
        step: to be found.
        last: about the step at its end.
    """
    low, high, below, above = 0, size, 0, max(last, 1)
    aside = -AROUND // 2
    while high - low > AROUND:
        share = (step - below) / (above - below) if below <= step < above else 0.5
        middle = low + int((high - low) * share) + aside
        middle = min(max(middle, low + AROUND // 2), high - AROUND // 2)
        first = next(filter(of_a_step, parse(part(file, middle, AROUND)[1])), None)
        if first is None or first["step"] >= step:
            high, above = middle, first["step"] if first else above
            aside = 4 * aside if aside < 0 else -AROUND // 2
        else:
            low, below = middle, first["step"]
            aside = 4 * aside if aside > 0 else AROUND // 2
    return low


def in_order(file: BinaryIO, places: list[tuple[int, int]], word: bytes = b"") -> Iterator[dict[str, Any]]:
    """The records that hold a word at some places of a file (where, and how many bytes), in order, each once."""
    end = 0
    for start, size in sorted((max(start, 0), size) for start, size in places):
        if size and start + size > end:
            begin, data = part(file, max(start, end), start + size - max(start, end))
            end = max(end, begin + len(data))
            yield from parse(data, word)

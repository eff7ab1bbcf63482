"""Record files (JSON lines) of any length, read in a time that does not grow with them: head, tail, single steps.

    records, whole = overview(run / "metrics.jsonl", validated_every=1000)      # enough to draw, of years of training
    newest = ends(run / "events.jsonl", head=0)[-1]

`metrics.jsonl` is ordered by step, which lets one find a step by halving. Needs only the standard library.
"""

import heapq
import json
import os
from bisect import bisect_left
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from .files import open_regular, read_bytes

BLOCK = 1 << 16
"""Bytes read at once from an end."""
WHOLE = 1 << 20
"""Bytes up to which a file is read whole."""
NUMBERS = {int, float, bool, type(None)}
"""Types of JSON's numbers, and null."""
VALIDATIONS, AROUND = 128, 1 << 12
"""Of a longer file: validations looked up, and the bytes within which one is looked for.

Half as many are read at each of `limit / AROUND` places all over it.
"""


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


def part(file: BinaryIO, start: int, size: int) -> tuple[int, bytes]:
    """The whole lines that begin in `size` bytes from `start`, or just behind it, and where they begin."""
    # A line that begins at `start` is told by the end of the one before.
    before = min(start, 1)
    data = os.pread(file.fileno(), before + size + AROUND, start - before)
    first = data.find(b"\n") + 1 if before else 0
    last = data.find(b"\n", before + size) + 1 or len(data)
    return start - before + first, data[first:last]


def ends(path: Path, head: int = BLOCK, tail: int = BLOCK) -> list[dict[str, Any]]:
    """The records in the first `head` and the last `tail` bytes of a file, in order, each once; [] without a file."""
    try:
        with open_regular(path) as file:
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
        limit: bytes up to which a file is read whole, and of a longer one a good half as many.

    Returns:
        The records, and whether they are all there are.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= limit:
                return list(filter(of_a_step, parse(os.pread(file.fileno(), size, 0)))), True
            points = limit // AROUND
            places = [(size * i // points, AROUND // 2) for i in range(points)] + [(size - limit // 8, limit // 8)]
            records, known = [], [(0, 0)]
            for begin, data in blocks_in_order(file, places):
                block = list(filter(of_a_step, parse(data)))
                known += [(begin, record["step"]) for record in block[:1]]
                records += block
            if validated_every:
                last = max((record["step"] for record in records), default=0)
                known.append((size, last + 1))
                steps = range(last // validated_every * validated_every, -1, -validated_every)
                steps = steps[:: -(-len(steps) // VALIDATIONS)]
                met = {record["step"] for record in records if "validation_loss" in record}
                validations = chain.from_iterable(
                    validations_about(file, step, known) for step in reversed(steps) if step not in met
                )
                others = {record["step"]: record for record in validations if record["step"] not in met}
                records = list(heapq.merge(records, others.values(), key=lambda record: record["step"]))
            return records, False
    except OSError:
        return [], True


def thinned(step: int, every: int | None) -> bool:
    """Whether `overview` leaves out validations, one each `every` steps, of a long file that ends at a step."""
    return bool(every) and step > every * VALIDATIONS


def validations_about(file: BinaryIO, step: int, known: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """The validations in a few kilobytes about the first record of a step, its own among them, if there is one.

    They are looked for where they would be if all lines were as long, and where they turn out to be elsewhere, in the
    middle of what is left and where they would be in turns: in one look where lines are alike, in the logarithm of
    them at worst.

    Args:
        file: a metrics.jsonl.
        step: to be found.
        known: places in the file and the steps of the records there, in order, from its beginning to its end.
    """
    after = max(bisect_left(known, step, key=lambda place: place[1]), 1)
    (low, below), (high, above) = known[after - 1], known[after]
    halve = False
    while True:
        close = high - low <= AROUND
        share = (step - below) / (above - below) if below <= step < above and not halve else 0.5
        middle = low + int((high - low) * share) - AROUND
        middle = low if close else min(max(middle, low + AROUND // 2), high - AROUND // 2)
        data = part(file, middle, 3 * AROUND)[1]
        found = list(filter(of_a_step, parse(data, b"validation_")))
        if close or any(record["step"] == step for record in found):
            return found
        first = next(filter(of_a_step, parse(data)), None)
        if first is None or first["step"] >= step:
            high, above = middle, first["step"] if first else above
        else:
            low, below = middle, first["step"]
        halve = not halve


def in_order(file: BinaryIO, places: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """The records at some places of a file (where, and how many bytes), in order, each once."""
    return chain.from_iterable(parse(data) for _, data in blocks_in_order(file, places))


def blocks_in_order(file: BinaryIO, places: list[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    """The whole lines at some places of a file (where, how many bytes), in order, each once, and where they begin."""
    end = 0
    for start, size in sorted((max(start, 0), size) for start, size in places):
        if size and start + size > end:
            begin, data = part(file, max(start, end), start + size - max(start, end))
            end = max(end, begin + len(data))
            yield begin, data

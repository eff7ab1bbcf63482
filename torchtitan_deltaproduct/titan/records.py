"""metrics.jsonl and samples.jsonl, which belong to the run, not to a launch.

    restore_history(path, step, saved_at)           # a restart: the file reads as if the run had never stopped
    records = RecordFile(path)
    records.write({"step": 20, "loss": 5.1})

No record is deleted: what a killed run logged beyond the step at which a restart begins goes to
`metrics.repeated.jsonl`, and the file of a run that another replaces in its folder to `metrics.until-TIME.jsonl`; it
comes back with its run.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from ..errors import ConfigError
from ..files import open_regular, replacing
from ..history import blocks_from_the_end, ends, parse_line

logger = logging.getLogger(__name__)

RECORDS = ("metrics.jsonl", "samples.jsonl")
"""The files of records in a run folder."""


def restore_history(path: Path, step: int, saved_at: float, redone: bool = False) -> str:
    """Makes `path` the record of the run that goes on after `step`; nothing is deleted.

    Args:
        path: metrics.jsonl or samples.jsonl.
        step: optimizer steps taken; 0: a run that begins.
        saved_at: when the checkpoint was saved that it goes on from, in seconds since 1970.
        redone: whether the records of `step` itself are written anew, too.

    Returns:
        What was moved where, in words; "" if nothing was.

    Raises:
        ConfigError: the files cannot be written.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no file; expected the records of a run: move it away")
    try:
        if step == 0:
            return set_aside(path)
        moved = ""
        if path.exists() and saved_at < began(path):
            # The file of a try-out in the folder of a run that goes on now: began after the run's checkpoint was saved.
            others = path.parent.glob(f"{path.stem}.until-*.jsonl")
            earlier = {other: latest for other in others if (latest := last_before(other, saved_at)) > -math.inf}
            moved = set_aside(path)
            if earlier:
                # That of the run: its last record before the save is the last of all.
                own = max(earlier, key=earlier.__getitem__)
                own.rename(path)
                moved += f"; {own.name} is {path.name} again"
        return "; ".join(filter(None, (moved, set_repeated_aside(path, step - redone))))
    except OSError as error:
        raise ConfigError(f"{path} cannot be brought to step {step}: {error}; make room, and start again") from None


def set_aside(path: Path) -> str:
    """Renames a record file after the time of its last change; says so, or "" if it holds nothing."""
    if not path.exists() or not path.stat().st_size:
        return ""
    stem = f"{path.stem}.until-{time.strftime('%Y%m%d-%H%M%S', time.localtime(path.stat().st_mtime))}"
    names = (path.with_name(f"{stem}{'-' * (n > 1)}{n if n > 1 else ''}.jsonl") for n in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    return f"the {path.name} of the run that was here is kept as {aside}"


def began(path: Path) -> float:
    """Time of a file's earliest record, in seconds since 1970; never, for one without records."""
    # Not of its first line alone, in which a bit may have flipped.
    return min(times(ends(path, tail=0)), default=math.inf)


def last_before(path: Path, limit: float) -> float:
    """Time of a file's last record up to `limit`; -infinity, for one without such."""
    with contextlib.suppress(OSError), open_regular(path) as file:
        for _, block in blocks_from_the_end(file):
            if earlier := [when for when in times(filter(None, map(parse_line, block))) if when <= limit]:
                return max(earlier)
    return -math.inf


def times(records: Iterable[dict]) -> list[float]:
    return [record["time"] for record in records if isinstance(record.get("time"), int | float)]


def set_repeated_aside(path: Path, last_step: int) -> str:
    """Moves the lines of `path` past `last_step`, and damaged ones, to a file `.repeated` beside it; says so."""
    if not path.exists():
        return ""
    blocks = [(path.stat().st_size, [])]
    with open_regular(path) as file:
        # Records are in order, and what is to be moved stands at the end: as far back as a block holds any of it.
        for start, block in blocks_from_the_end(file):
            blocks.append((start, block))
            if all(is_up_to(line, last_step) for line in block):
                break
    start = blocks[-1][0]
    lines = [line for _, block in reversed(blocks) for line in block]
    kept = [line for line in lines if is_up_to(line, last_step)]
    moved = [line for line in lines if not is_up_to(line, last_step)]
    if not moved:
        return ""
    header = json.dumps({"repeated_from_step": last_step + 1, "time": round(time.time(), 3)}).encode() + b"\n"
    aside = path.with_name(f"{path.stem}.repeated.jsonl")
    # First the copy, then the cut: a kill between them leaves a record twice, never none.
    with open(aside, "ab") as file:
        file.write(b"".join([header, *moved, b"" if moved[-1].endswith(b"\n") else b"\n"]))
        sync(file)
    if kept == lines[: len(kept)]:
        with open(path, "r+b") as file:
            file.truncate(start + sum(map(len, kept)))
            sync(file)
    else:
        with open(path, "rb") as old, replacing(path) as file:
            shutil.copyfileobj(old, file)
            file.truncate(start)
            file.seek(start)
            file.write(b"".join(kept))
    damaged = sum(not isinstance((parse_line(line) or {}).get("step"), int) for line in moved)
    what = f"{len(moved)} records past step {last_step}" + (f" ({damaged} lines damaged)" if damaged else "")
    return f"{what}, which this run repeats, are kept in {aside}"


def is_up_to(line: bytes, last_step: int) -> bool:
    """Whether a line is the record of a step no later than `last_step`."""
    step = (parse_line(line) or {}).get("step")
    return isinstance(step, int) and step <= last_step


def sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class RecordFile:
    """metrics.jsonl, opened to append. A disk that is full costs records, which are counted, not the run."""

    def __init__(self, path: Path) -> None:
        self.path, self.lost, self.torn = path, 0, False
        self.handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, record: dict) -> None:
        """Appends one line by one write."""
        # After a line that was cut short, a new one begins: readers leave out what does not parse.
        line = (b"\n" if self.torn else b"") + json.dumps(record).encode() + b"\n"
        try:
            self.torn = os.write(self.handle, line) < len(line)
            error = "the disk is full" if self.torn else ""
        except OSError as reason:
            error = reason.strerror or str(reason)
        if error:
            self.lost += 1
            if self.lost == 1:
                logger.warning("%s cannot be written (%s); records are lost until it can", self.path, error)

    def close(self) -> None:
        os.close(self.handle)

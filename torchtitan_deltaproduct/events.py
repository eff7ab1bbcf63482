"""RUN/events.jsonl: what happened to a run, one JSON line an event, over all its launches.

    {"event": "launch", "time": 1764000000.0, "step": 12000, "ranks": 8, "host": "n1", "slurm_job": "123",
     "slurm_restart": 2, "resumed_from": 12000}
    {"event": "stop", "time": 1764003600.0, "step": 12345, "reason": "signal", "detail": "SIGUSR1", "saved": true}

    append(run, "launch", step=0, ranks=8)
    last_stop(read_events(run))            # None after a hard kill: a launch without a stop

Reasons of a stop: `finished`, `signal`, `walltime`, `failed` (an error of the run's own), `hung`, `lost_peer` (another
rank is gone). Other events: `save`, `save_failed`, `skipped_step`, `loss_spike`, `bad_checkpoint`. A launcher decides
by this file whether to start the run again, and `status` tells its story from it. Needs only the standard library.
"""

import json
import os
import socket
import time
import types
from pathlib import Path
from typing import Any

from .files import read_bytes

NAME = "events.jsonl"


def append(run: str | Path, event: str, **fields: Any) -> dict[str, Any]:
    """Adds an event, by one write: a kill leaves a line or none, and ranks do not mix theirs.

    A folder that is not there or cannot be written (a full disk, a pipe in the file's place) is no reason to stop
    training: the event is lost.

    Args:
        run: the run folder.
        event: its kind.
        fields: JSON values.
    """
    record = {"event": event, "time": round(time.time(), 3), **fields}
    try:
        handle = os.open(Path(run, NAME), os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        try:
            # After a line that a full disk cut short, a new one begins: readers leave out what does not parse.
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            os.write(handle, ("\n" * torn + json.dumps(record) + "\n").encode())
        finally:
            os.close(handle)
    except OSError:
        pass
    return record


def read_events(run: str | Path) -> list[dict[str, Any]]:
    """All events of a run in order; [] if there are none. A line without the fields of its kind is left out."""
    return [record for record in read_jsonl(Path(run, NAME)) if fits(record)]


FIELDS: dict[str, dict[str, type | types.UnionType]] = {
    "launch": {"time": float | int, "step": int},
    "stop": {"time": float | int, "step": int | None, "reason": str, "detail": str, "saved": bool},
    "save": {"time": float | int, "step": int, "seconds": float | int, "reason": str},
    "save_failed": {"step": int},
    "skipped_step": {"step": int},
    "loss_spike": {"step": int},
    "bad_checkpoint": {"step": int},
}
"""What readers count on, kind by kind: a flipped bit may change a name or a type and leave valid JSON."""


def fits(record: dict[str, Any]) -> bool:
    """Whether a record is an event with all that readers of its kind count on."""
    expected = {"event": str} | FIELDS.get(str(record.get("event")), {})
    return all(name in record and isinstance(record[name], kind) for name, kind in expected.items())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; [] without a file. A line that does not parse is left out."""
    try:
        lines = read_bytes(path).splitlines()
    except OSError:
        return []
    return [record for record in map(parse_line, lines) if record is not None]


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, `{"step": 20, "loss": 5.1, ...}`; a damaged line is left out."""
    return [
        record
        for record in read_jsonl(Path(run, "metrics.jsonl"))
        if type(record.get("step")) is int and all(isinstance(v, int | float | None) for v in record.values())
    ]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None for one that a kill, a full disk or a flipped bit made something else."""
    try:
        record = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def last_stop(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How the newest launch ended: its first stop that says why, or None if it was killed outright.

    The first, because the ranks that a failing one leaves behind stop too, for want of it; that they do is the answer
    only where no rank knows better.
    """
    stop = None
    for record in events:
        if record["event"] == "launch":
            stop = None
        elif record["event"] == "stop" and (stop is None or stop["reason"] == "lost_peer"):
            stop = record
    return stop


def whereabouts() -> dict[str, Any]:
    """Host and SLURM job of this process, for a `launch`."""
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT")
    return {"host": socket.gethostname(), "slurm_job": job, "slurm_restart": int(restart) if restart else None}

"""RUN/events.jsonl: what happened to a run, one JSON line an event, over all its launches.

    {"event": "launch", "time": 1764000000.0, "step": 12000, "ranks": 8, "host": "n1", "slurm_job": "123",
     "slurm_restart": 2, "arguments": ["--job.config_file", "x.toml"]}
    {"event": "stop", "time": 1764003600.0, "step": 12345, "reason": "signal", "detail": "SIGUSR1", "saved": true}

    append(run, "launch", step=0, ranks=8)
    last_stop(read_events(run))            # None after a hard kill: a launch without a stop

Reasons of a stop: `finished`, `signal`, `walltime`, `failed` (an error of the run's own), `machine` (a device or a file
system failed), `hung`, `lost_peer` (another rank is gone). Other events: `save`, `save_failed`, `skipped_step`,
`loss_spike`, `bad_checkpoint`. A launcher decides by this file whether to start the run again, and `status` tells its
story from it. Needs only the standard library.
"""

import json
import os
import socket
import sys
import time
import types
from pathlib import Path
from typing import Any

from .history import ends

NAME = "events.jsonl"
LIMIT = 1 << 22
"""Bytes of it that are read: some 40,000 events, the newest."""
LAUNCHED = "TORCHTITAN_DELTAPRODUCT_LAUNCHED"
"""The environment variable by which `launch.torchrun` tells its ranks when it began, in seconds since 1970."""
LATEST = 1e11
"""Seconds since 1970 that are no time any more; nor are NaN and infinity."""


def append(run: str | Path, event: str, **fields: Any) -> None:
    """Adds an event, by one write: a kill leaves a line or none, and ranks of one node do not mix theirs.

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


def read_events(run: str | Path) -> list[dict[str, Any]]:
    """A run's events in order; [] if there are none. A line without the fields of its kind is left out.

    Of a file longer than `LIMIT` bytes the first ones and the last.
    """
    return [record for record in ends(Path(run, NAME), tail=LIMIT) if fits(record)]


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
    when = record.get("time", 0.0)
    if not (isinstance(when, int | float) and abs(when) < LATEST):
        return False
    return all(name in record and isinstance(record[name], kind) for name, kind in expected.items())


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


def began(events: list[dict[str, Any]]) -> float | None:
    """When a run was launched for the first time, in seconds since 1970; None before that.

    A launch at step 0 after a save begins another run in the same folder.
    """
    first, saved = None, False
    for record in events:
        if record["event"] == "launch" and (first is None or (saved and record["step"] == 0)):
            first, saved = record["time"], False
        saved |= record["event"] == "save" and record["step"] > 0
    return first


def started_by() -> dict[str, str | int]:
    """SLURM job and torchrun of this process, and how often each was started again; "" and 0 without them."""
    return {
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        # Without --rdzv-id the name of every torchrun is "none".
        "torchrun": os.environ.get("TORCHELASTIC_RUN_ID", "").removeprefix("none"),
        "torchrun_restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0),
    }


def is_restart(own: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether one process is of a restart of the launch of the other, by their `started_by`.

    SLURM requeues a job when all of it has ended, and torchrun starts ranks again when all have: the other is gone.
    """
    for job, restart in (("slurm_job", "slurm_restart"), ("torchrun", "torchrun_restart")):
        before = other.get(restart)
        if own[job] and own[job] == other.get(job) and own[restart] > (before if isinstance(before, int) else 0):
            return True
    return False


def whereabouts() -> dict[str, Any]:
    """Host, what started this process, and its command line, for a `launch`; None where there is nothing to say."""
    by = {name: value or None for name, value in started_by().items()}
    return {"host": socket.gethostname(), **by, "arguments": sys.argv[1:]}


def began_before(events: list[dict[str, Any]], step: int) -> bool:
    """Whether this process is of a restart, with the same command line, of a launch that went on from `step`.

    That an earlier launch of the same torchrun is on record is enough: this process has not written its own yet, and
    where ranks of one node were lost, torchrun raises the restart count on that node alone. Who gives the same name to
    two torchruns is told apart by the time at which `launch.torchrun` began.
    """
    own, launched = started_by(), float(os.environ.get(LAUNCHED) or 0)
    launches = [record for record in events if record["event"] == "launch" and record["step"] == step]
    launches = [record for record in launches if record.get("arguments") == sys.argv[1:]]
    return any(
        is_restart(own, one) or (own["torchrun"] and own["torchrun"] == one.get("torchrun") and one["time"] >= launched)
        for one in launches
    )

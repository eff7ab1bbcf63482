"""The heartbeat of a run, and what happens when it stops.

    watchdog = Watchdog(run, rank, seconds=1200)
    watchdog.beat(step, "step")            # after each step, validation batch and save

Rank 0 writes RUN/heartbeat.json at most once a second. A rank that has not beaten for `seconds` writes the Python
stacks of all its threads, and what its collectives were doing (torch's flight recorder, where the backend has one), to
RUN/stacks/, and exits with code 70, so that the launcher starts the run again from its newest checkpoint. Ranks that
wait for a stuck one run into the same limit and write theirs: together the files say who waits for whom.

Two clocks watch. A Python thread does all of the above; faulthandler's C thread stands behind it for a process that
hangs with the interpreter's lock held, where no Python thread runs.
"""

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path

from .. import events
from ..torch_internals import flight_records

logger = logging.getLogger(__name__)

EXIT_HUNG = 70
"""Exit code of a rank that hung (EX_SOFTWARE of sysexits.h)."""
GRACE = 10.0
"""Seconds between the dump and the exit: other ranks write theirs before the launcher ends them."""
FIRST_STEP = 6.0
"""Until the first step has ended everything may take so many times longer: it compiles."""


class Watchdog:
    """Watches one rank, from `start` to `close`.

    Args:
        run: the run folder.
        rank: of this process.
        seconds: without a beat before it acts; 0: never, only the heartbeat is written.
    """

    def __init__(self, run: Path, rank: int, seconds: float) -> None:
        self.run, self.rank, self.seconds = run, rank, seconds
        self.step, self.what = 0, "starting"
        self.factor = FIRST_STEP
        self.last = time.monotonic()
        self.written = self.armed = 0.0
        self.closed = threading.Event()
        self.fallback = None

    def start(self, step: int) -> None:
        """Begins to watch at `step`."""
        self.beat(step, "starting")
        if self.seconds > 0:
            folder = self.run / "stacks"
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                # Appended to: what an earlier launch left there is why this one was started.
                self.fallback = open(folder / f"rank-{self.rank}.locked.txt", "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
            self._arm()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int, what: str) -> None:
        """Notes that the run is alive: it has just finished `what` at `step`.

        Args:
            step: optimizer steps begun.
            what: `step`, `validation batch`, `save`, ...; the longer limit of the start holds until a `step` has ended:
                a validation before it says nothing of that step.
        """
        self.step, self.what = step, what
        factor = self.factor
        if what == "step":
            self.factor = 1.0
        self.last = time.monotonic()
        # Each time it is armed a thread ends and another begins.
        if self.last - self.armed >= 1.0 or self.factor != factor:
            self._arm()
        if self.rank == 0 and self.last - self.written >= 1.0:
            self.written = self.last
            write_heartbeat(self.run, step, what)

    @property
    def limit(self) -> float:
        """Seconds that may pass from the last beat."""
        return self.seconds * self.factor

    def _arm(self) -> None:
        if self.seconds > 0 and self.fallback is not None:
            self.armed = self.last
            faulthandler.dump_traceback_later(self.limit + 3 * GRACE, exit=True, file=self.fallback)

    def _watch(self) -> None:
        while not self.closed.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self.last > self.limit:
                self._act()

    def _act(self) -> None:
        silent = time.monotonic() - self.last
        message = f"no sign of life for {silent:.0f} s after the {self.what} of step {self.step}"
        path = self.run / "stacks" / f"rank-{self.rank}.txt"
        with contextlib.suppress(OSError):
            write_stacks(path, f"rank {self.rank} on {socket.gethostname()}: {message}")
        events.append(self.run, "stop", step=self.step, reason="hung", detail=message, saved=False, rank=self.rank)
        print(f"[rank {self.rank}] {message}; stacks in {path}; exit code {EXIT_HUNG}", file=sys.stderr, flush=True)
        time.sleep(GRACE)
        os._exit(EXIT_HUNG)

    def close(self) -> None:
        """Stops watching."""
        self.closed.set()
        if self.fallback is not None:
            faulthandler.cancel_dump_traceback_later()
            self.fallback.close()
            # Only a process that hangs with the lock held writes there.
            with contextlib.suppress(OSError):
                if not os.path.getsize(self.fallback.name):
                    os.unlink(self.fallback.name)
                    (self.run / "stacks").rmdir()
            self.fallback = None


def write_heartbeat(run: Path, step: int, what: str) -> None:
    """Replaces RUN/heartbeat.json; a full disk is not a reason to stop."""
    body = {"time": round(time.time(), 3), "step": step, "after": what}
    body |= {"host": socket.gethostname(), "pid": os.getpid()}
    unfinished = run / "heartbeat.json.tmp"
    with contextlib.suppress(OSError):
        unfinished.write_text(json.dumps(body) + "\n", encoding="utf-8")
        os.replace(unfinished, run / "heartbeat.json")


def write_stacks(path: Path, title: str) -> None:
    """Writes the stacks of all threads, and the flight record of the collectives where there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {title}\n", file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)
    for name, record in flight_records().items():
        path.with_suffix(f".{name}.json").write_bytes(record)

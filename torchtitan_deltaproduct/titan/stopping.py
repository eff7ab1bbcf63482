"""When a run has to stop early: signals and walltime, agreed on by all ranks.

    with Stopping() as stopping:                  # first thing in the program: a signal from now on is not lost
        ...
        total = reduce(stopping.flags(step_seconds, save_seconds))      # with the loss, no collective of its own
        why = stopping.reason(total)              # "SIGUSR1" on every rank if any of them got it

A signal only sets a flag. Every step sums the flags of all ranks, so all see the same at one step, save it and end.
Further signals change nothing: the run is stopping already, as fast as it safely can.

A run that knows when its time is over (the end of its SLURM job, or `guard.walltime_minutes`) stops by itself while
there is time to finish a step and a save, by its own measured durations of both.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence

from ..events import LAUNCHED

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
WALLTIME = "walltime"
FLAGS = len(SIGNALS) + 1
"""Numbers that `Stopping.flags` returns: one a signal, and the walltime."""


class Stopping:
    """Notes signals while it is entered (in the main thread; elsewhere it notes none); see the module."""

    def __init__(self) -> None:
        self.seen: dict[signal.Signals, int] = dict.fromkeys(SIGNALS, 0)
        self.deadline: float | None = None
        self.margin = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        # No logging: the signal may have come in the middle of a log line.
        self.seen[signal.Signals(number)] += 1

    def set_walltime(self, minutes: float, margin_seconds: float) -> str:
        """Sets when the run's time is over, and returns the line that says so ("" if nothing limits it).

        Args:
            minutes: from the launch on, whose ranks torchrun may have started again; 0: the end of the SLURM job this
                process is in, if it is in one.
            margin_seconds: kept free beyond a step and a save.
        """
        self.margin = margin_seconds
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        if minutes > 0:
            begun = float(os.environ.get(LAUNCHED) or time.time())
            self.deadline, why = begun + 60 * minutes, "guard.walltime_minutes"
        elif end.isdigit():
            self.deadline, why = float(end), "SLURM_JOB_END_TIME"
        else:
            self.deadline = None
            return ""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.deadline))
        return f"walltime: until {when} ({why}); saves and stops {margin_seconds:.0f} s and a step and a save before"

    def out_of_time(self, step_seconds: float, save_seconds: float) -> bool:
        """Whether another step and a save might not fit, by this process's clock.

        Args:
            step_seconds: the longest of the last steps, validation included.
            save_seconds: the longest of the last saves.
        """
        if self.deadline is None:
            return False
        return time.time() + 2 * step_seconds + 2 * save_seconds + self.margin >= self.deadline

    def flags(self, step_seconds: float = 0.0, save_seconds: float = 0.0) -> list[float]:
        """[FLAGS] numbers of this rank, above 0 where it wants to stop, to be summed over ranks."""
        late = self.out_of_time(step_seconds, save_seconds)
        return [float(count > 0) for count in self.seen.values()] + [float(late)]

    @staticmethod
    def reason(totals: Sequence[float]) -> str | None:
        """Why to stop, from the flags summed over all ranks: `SIGTERM`, `SIGINT`, `SIGUSR1` or `walltime`."""
        names = [number.name for number in SIGNALS] + [WALLTIME]
        return next((name for name, total in zip(names, totals, strict=True) if total > 0), None)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes and threads started meanwhile do not hear stop signals, nor do the processes that these start.

    A cluster signals every process of a job: a helper that dies of it would take with it what the run needs to save and
    stop. Helpers need no signal to end: they follow their pipe.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

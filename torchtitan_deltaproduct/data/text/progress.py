"""Progress of a long job over bytes: a bar with ETA on a terminal, a plain line every ten seconds elsewhere.

with Progress("tokenize", total=bytes_to_read) as progress:
    progress.update(done=bytes_read, note="1.2 M tokens")
"""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from torchtitan_deltaproduct.formats import clock

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Args: title: of the job; total: bytes; done: those of an earlier run; lines: whether to write lines."""

    def __init__(self, title: str, total: int, done: int = 0, lines: bool = True):
        self.title, self.total, self.start_done = title, max(total, 1), done
        self.start = self.last_line = time.monotonic()
        self.bar, self.lines = None, lines
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, TextColumn("{task.fields[note]}"), console=console, speed_estimate_period=60)
            self.task = self.bar.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done: int, note: str = "") -> None:
        if self.bar:
            self.bar.update(self.task, completed=done, note=note)
            return
        now = time.monotonic()
        if self.lines and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            print(self.line(done, now - self.start, note), file=sys.stderr, flush=True)

    def line(self, done: int, seconds: float, note: str) -> str:
        """`tokenize  41 %  12.3 of 30.1 MB, 2.9 MB/s, 0:00:06 left, 1.2 M tokens`."""
        rate = (done - self.start_done) / seconds
        left = f"{clock((self.total - done) / rate)} left" if rate > 0 else "time left unknown"
        share, mega = min(1.0, done / self.total), 1e-6
        return (
            f"{self.title} {share:4.0%}  {done * mega:.1f} of {self.total * mega:.1f} MB, "
            f"{rate * mega:.1f} MB/s, {left}{', ' if note else ''}{note}"
        )

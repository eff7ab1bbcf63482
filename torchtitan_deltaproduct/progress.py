"""Progress of a long job, with its rate and what is left of its time, on standard error.

    with Progress("tokenize", total=bytes_to_read, lines=True) as progress:
        progress.update(done=bytes_read, note="1.2 M tokens")
    with Progress("outputs/run", total=tokens_to_read, unit="tokens") as progress:
        progress.advance(1024)

A bar on a terminal, which leaves nothing behind; elsewhere nothing, or a plain line every ten seconds.
"""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from .formats import amount, clock, count

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Args: title: of the job; total: to be done, in `unit`; done: by an earlier run; lines: whether to write lines
    where there is no terminal; quiet: whether to show nothing, as one of many processes.
    """

    def __init__(
        self, title: str, total: int, unit: str = "B", done: int = 0, lines: bool = False, quiet: bool = False
    ) -> None:
        self.title, self.total, self.unit, self.done, self.done_before = title, total, unit, done, done
        self.start = self.last_line = time.monotonic()
        self.bar, self.lines = None, lines and not quiet
        console = Console(stderr=True)
        if console.is_terminal and not quiet:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(),
                       TextColumn("{task.fields[numbers]}", markup=False))  # fmt: skip
            self.bar = Bar(*columns, console=console, transient=True, redirect_stdout=False)
            self.task = self.bar.add_task(title, total=total, completed=done, numbers="")

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.bar:
            self.bar.stop()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return max(time.monotonic() - self.start, 1e-9)

    def advance(self, more: int) -> None:
        """Tells that so much more is done."""
        self.update(self.done + more)

    def update(self, done: int, note: str = "") -> None:
        """Tells how much is done in all."""
        self.done = done
        if self.bar:
            self.bar.update(self.task, completed=done, description=self.title, numbers=self.numbers(note))
        elif self.lines and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            share = min(1.0, done / max(self.total, 1))
            print(f"{self.title} {share:4.0%}  {self.numbers(note)}", file=sys.stderr, flush=True)

    def numbers(self, note: str) -> str:
        """`12.3 MB of 30.1 MB, 2.9 MB/s, 0:00:06 left, 1.2 M tokens`."""
        rate = (self.done - self.done_before) / self.seconds
        left = f"{clock((self.total - self.done) / rate)} left" if rate > 0 else "time left unknown"
        of = f"{self.quantity(self.done).removesuffix(' ' + self.unit)} of {self.quantity(self.total)}"
        return ", ".join(filter(None, (of, f"{self.quantity(rate)}/s", left, note)))

    def quantity(self, value: float) -> str:
        return amount(value, self.unit) if self.unit == "B" else f"{count(round(value))} {self.unit}"

"""How far a reading of tokens is, a line now and then.

meter = Meter(total=1_000_000, console=console, name="outputs/run"); meter.advance(1024); meter.finish()
"""

import time
from dataclasses import dataclass, field

from rich.console import Console

from torchtitan_deltaproduct.formats import clock

SECONDS_BETWEEN_LINES = 10.0


@dataclass
class Meter:
    """Tells how many of `total` tokens are read of what has the `name`, on each of some `ranks`."""

    total: int
    console: Console
    name: str = ""
    ranks: int = 1
    done: int = 0
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        self.last_line = self.start
        self.each = f" on each of {self.ranks} ranks" if self.ranks > 1 else ""

    def advance(self, tokens: int) -> None:
        """Counts tokens that were read, and says so every `SECONDS_BETWEEN_LINES`."""
        self.done += tokens
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            speed = self.done / (now - self.start)
            left = clock((self.total - self.done) / speed)
            line = f"{self.done:,} of {self.total:,} tokens, {speed:,.0f} tokens/s{self.each}, {left} left"
            self.console.print(f"{self.name}: {line}", soft_wrap=True)

    def finish(self) -> None:
        """Says how long all of it took."""
        seconds = time.monotonic() - self.start
        self.console.print(
            f"{self.total:,} tokens in {clock(seconds)}, {self.total / seconds:,.0f} tokens/s{self.each}"
        )

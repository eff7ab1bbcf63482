"""The processes of an eval under torchrun, which share its work; without torchrun, one.

    torchrun --nproc_per_node 8 -m eval.length_extrapolation MODEL --data SET

    with Ranks() as ranks:
        texts = ranks.first(lambda: open_texts(...))        # done by rank 0; all get the result, or its UserError
        meter = Meter(total_tokens, console, "outputs/run", ranks.world)
        for part in parts[ranks.rank :: ranks.world]: ...; meter.advance(1024)
        ranks.wait()

What is done need not take equally long: nobody gives up waiting.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from rich.console import Console

from torchtitan_deltaproduct.errors import UserError
from torchtitan_deltaproduct.formats import clock

PATIENCE = timedelta(days=30)
SECONDS_BETWEEN_LINES = 10.0
T = TypeVar("T")


class Ranks:
    """Context in which the ranks can talk (gloo, whatever the device of the models); `rank` is ours of `world`."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def __enter__(self) -> "Ranks":
        if self.world > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            dist.init_process_group("gloo", timeout=PATIENCE)
        return self

    def __exit__(self, kind, *exception) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def first(self, do: Callable[[], T]) -> T:
        """What `do` returns on rank 0, where alone it is called; a UserError it raises is raised on all ranks."""
        if self.world == 1:
            return do()
        outcome: list = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = do()
            except UserError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        result, error = outcome
        if error is not None:
            raise error
        return result

    def wait(self) -> None:
        """Returns when all ranks have come here."""
        if self.world > 1:
            dist.barrier()


class Meter:
    """Tells how many of `total` tokens are read of what has the `name`, on each of some `ranks`."""

    def __init__(self, total: int, console: Console, name: str = "", ranks: int = 1):
        self.total, self.console, self.name, self.done = total, console, name, 0
        self.each = f" on each of {ranks} ranks" if ranks > 1 else ""
        self.start = self.last_line = time.monotonic()

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

"""The processes of an eval under torchrun, which share its work; without torchrun, one.

    torchrun --nproc_per_node 8 -m eval.length_extrapolation MODEL --data SET

    with Ranks() as ranks:
        texts = ranks.first(lambda: open_texts(...))        # done by rank 0; all get the result, or its UserError
        for part in parts[ranks.rank :: ranks.world]: ...
        ranks.wait()

What is done need not take equally long: nobody gives up waiting.
"""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from torchtitan_deltaproduct.agreement import T, from_rank_0
from torchtitan_deltaproduct.errors import ConfigError

PATIENCE = timedelta(days=30)


def refuse_torchrun(command: str) -> None:
    """Raises ConfigError where torchrun started several processes of an eval that shares nothing among them."""
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(f"{command} works in one process, found {world} (WORLD_SIZE): start it without torchrun")


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
        return from_rank_0(do)

    def wait(self) -> None:
        """Returns when all ranks have come here."""
        if self.world > 1:
            dist.barrier()

"""Ranks that share a sequence, and what they tell one another: context parallelism's collectives.

Rank r of W holds tokens r T/W to (r+1) T/W of every row. `gather` brings what each of them has to all, and
`from_previous` the last tokens of one shard to the next, for convolutions. Functional collectives: torch.compile and
activation checkpointing see them. Every rank runs every collective and reads all of its result, whether it needs it or
not: a compiler that dropped an unused one on one rank would leave the others waiting.

    halo = from_previous(x[:, -3:], SequenceRanks(group.group_name, rank=1, size=4))       # zeros on rank 0
"""

from dataclasses import dataclass

import torch
import torch.distributed._functional_collectives  # noqa: F401  (fakes of the collectives)
from torch import Tensor

from torchtitan_deltaproduct.ops.library import fake, operator


@dataclass(frozen=True)
class SequenceRanks:
    """The process group over which each sequence is cut, by name, and this rank's place in it."""

    group: str
    rank: int
    size: int


def gather(x: Tensor, size: int, group: str) -> Tensor:
    """x: [...] of each rank -> [size, ...] on all, without a gradient."""
    gathered = GATHER(x.contiguous(), size, group)
    return torch.ops._c10d_functional.wait_tensor(gathered).view(size, *x.shape)


def from_previous(x: Tensor, ranks: SequenceRanks) -> Tensor:
    """What the previous rank gave as x; zeros on the first. Its gradient goes back to the rank it came from."""
    return _FromPrevious.apply(x, ranks.rank, ranks.size, ranks.group)


class _FromPrevious(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rank: int, size: int, group: str) -> Tensor:
        ctx.ranks = rank, size, group
        return PART(gather(x, size, group), rank - 1)

    @staticmethod
    def backward(ctx, dy: Tensor):
        rank, size, group = ctx.ranks
        return PART(gather(dy, size, group), rank + 1), None, None, None


@operator("part_of_ranks")
def _part(gathered: Tensor, rank: int) -> Tensor:
    """gathered[rank], zeros if there is no such rank. An op, so that no compiler sees that the others are not read."""
    if 0 <= rank < gathered.shape[0]:
        return gathered[rank].clone()
    return torch.zeros_like(gathered[0])


@fake(_part)
def _(gathered: Tensor, rank: int) -> Tensor:
    return gathered.new_empty(gathered.shape[1:])


PART = _part
GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default

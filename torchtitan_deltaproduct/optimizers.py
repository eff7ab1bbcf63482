"""The optimizers a run may name, and the clipping of gradients, on the part of each tensor that this rank holds.

    norm = clip_gradients(model.parameters(), max_norm=1.0)    # [] on the device; the host does not wait for it
    optimizer = AdamW(model.parameters(), lr=3e-4, fused=True)

torch does both on DTensors, and looks up how each is sharded in every operation: on the host that takes more than twice
as long. Neither needs it: an update is elementwise, and a norm is one sum over ranks. Parameters and moments stay
DTensors in the optimizer's groups and state, which is what checkpoints are made of.

A further optimizer is a line in `OPTIMIZERS`: config, trainer, memory and the sizes of checkpoints go by it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients by min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does.

    Where the norm is NaN they are left as they are, so that the bad ones among them can be named.

    Returns:
        The norm of all gradients together before that: [] float32 on their device, the same on all ranks.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [local(gradient) for gradient in gradients]
    norms_by_layout = defaultdict(list)
    for gradient, norm in zip(gradients, torch._foreach_norm(parts), strict=True):
        layout = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else (None, ())
        norms_by_layout[layout].append(norm)
    total = torch.zeros((), dtype=torch.float64, device=parts[0].device)
    for (mesh, placements), norms in norms_by_layout.items():
        squares = torch.stack(norms).double().square().sum()
        for dimension, placement in enumerate(placements):
            if placement.is_shard() and mesh.size(dimension) > 1:
                dist.all_reduce(squares, group=mesh.get_group(dimension))
        total += squares
    norm = total.sqrt().float()
    torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0).nan_to_num(1.0))
    return norm


class _OnLocalParts:
    """An optimizer of torch whose update is given the local parts of what it collects from a group."""

    def _init_group(self, group: dict, *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(local, tensors)
        return has_complex


class Adam(_OnLocalParts, torch.optim.Adam):
    """torch's; see the module docstring."""


class AdamW(_OnLocalParts, torch.optim.AdamW):
    """torch's; see the module docstring."""


@dataclass(frozen=True)
class Kind:
    """What `optimizer.name` stands for."""

    algorithm: type[torch.optim.Optimizer]
    arguments: Callable[[Any], dict]
    """Its keyword arguments, from the `[optimizer]` table; `weight_decay` among them."""
    moments: int
    """Float32 numbers it keeps of every parameter."""


def _of_adam(table: Any) -> dict:
    return {
        "lr": table.lr,
        "betas": (table.beta1, table.beta2),
        "eps": table.eps,
        "weight_decay": table.weight_decay,
        "fused": table.implementation == "fused",
        "foreach": table.implementation == "foreach",
    }


OPTIMIZERS = {"AdamW": Kind(AdamW, _of_adam, moments=2), "Adam": Kind(Adam, _of_adam, moments=2)}

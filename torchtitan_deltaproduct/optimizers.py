"""The optimizers a run may name, and the clipping of gradients, on the part of each tensor that this rank holds.

    norm = clip_gradients(model.parameters(), max_norm=1.0)    # [] on the device; the host does not wait for it
    optimizer = AdamW(model.parameters(), lr=3e-4, fused=True)

torch does both on DTensors, and looks up how each is sharded in every operation: on the host that takes more than twice
as long. Neither needs it: an update is elementwise, and a norm is one sum over ranks. Parameters and moments stay
DTensors in the optimizer's groups and state, which is what checkpoints are made of.

Muon's update of a matrix is not elementwise: ranks send the rows of each matrix to one of them, which orthogonalises it
and sends the rows back (`on_whole_matrices`).

A further optimizer is a line in `OPTIMIZERS`: config, trainer, memory and the sizes of checkpoints go by it.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .torch_internals import muon_parts


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose class is slow to import."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor this rank holds."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


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
        layout = (gradient.device_mesh, gradient.placements) if is_dtensor(gradient) else (None, ())
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


class Muon(_OnLocalParts, torch.optim.Muon):
    """torch's Muon (https://kellerjordan.github.io/posts/muon/), of matrices that ranks may share by rows.

    Momentum is as sharded as the weights. A group may have `stacked` = n: its matrices are n of equal size, one below
    the other, and each is orthogonalised for itself. With `found_inf` above 0 a step changes nothing, and nobody waits
    for the device to know it.
    """

    _step_supports_amp_scaling = True
    """What torch's GradScaler goes by, as with fused Adam."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            weights, gradients, momenta = [], [], []
            self._init_group(group, weights, gradients, momenta)
            whole = [parameter for parameter in group["params"] if parameter.grad is not None]
            skip = getattr(self, "found_inf", torch.zeros((), device=weights[0].device)) > 0
            # Moved towards itself, a momentum stays what it is.
            gradients = [torch.where(skip, m, g) for m, g in zip(momenta, gradients, strict=True)]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
            updates = self.orthogonalized(updates, whole, group)
            torch._foreach_mul_(weights, torch.where(skip, 1.0, 1 - group["lr"] * group["weight_decay"]))
            for parameter, weight, update in zip(whole, weights, updates, strict=True):
                rows, columns = parameter.shape
                rate = muon_parts()[1](group["lr"], group["adjust_lr_fn"], (rows // group.get("stacked", 1), columns))
                weight.add_(torch.where(skip, 0, update.to(weight.device)), alpha=-rate)

    def orthogonalized(self, updates: list[Tensor], whole: list[nn.Parameter], group: dict) -> list[Tensor]:
        """This rank's rows of the orthogonalised matrices, bfloat16.

        Args:
            updates: this rank's rows of the matrices that are to be orthogonalised.
            whole: the parameters they belong to, all on one mesh.
            group: of the optimizer, with the settings.
        """
        newton_schulz = muon_parts()[0]
        settings = group["ns_coefficients"], group["ns_steps"], group["eps"]

        def orthogonalize(matrix: Tensor) -> Tensor:
            return torch.cat([newton_schulz(part, *settings) for part in matrix.chunk(group.get("stacked", 1))])

        ranks, device = row_group(whole[0]), updates[0].device
        if is_dtensor(whole[0]):
            # Weights that are offloaded to the host are orthogonalised on the device all the same.
            device = whole[0].device_mesh.device_type
        updates = [update.to(device, torch.bfloat16) for update in updates]
        if ranks is None:
            return list(map(orthogonalize, updates))
        return on_whole_matrices(orthogonalize, updates, [tuple(parameter.shape) for parameter in whole], ranks)


def row_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The ranks that share the rows of a matrix; None where each has all of them (one rank, or replicas)."""
    if not is_dtensor(tensor):
        return None
    mesh = tensor.device_mesh
    sharded = [i for i, placement in enumerate(tensor.placements) if placement.is_shard(0) and mesh.size(i) > 1]
    return mesh.get_group(sharded[0]) if sharded else None


def on_whole_matrices(
    function: Callable[[Tensor], Tensor], parts: list[Tensor], shapes: list[tuple[int, int]], group: dist.ProcessGroup
) -> list[Tensor]:
    """Applies a function to matrices that ranks share by rows, each on one rank; two all-to-alls for all of them.

    A rank sends its rows of all matrices and receives as many numbers as it sent, on the way there and back: of N
    numbers on R ranks 2 N / R, where gathering every matrix everywhere would bring N to each rank.

    Args:
        function: from a matrix to one of the same shape and dtype.
        parts: this rank's rows of each matrix, of one dtype and device, as `Shard(0)` divides them.
        shapes: of the whole matrices.
        group: the ranks.

    Returns:
        This rank's rows of each result.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    owned = dealt_out([orthogonalization_flops(*shape) for shape in shapes], ranks)

    def piece(matrix: int, holder: int) -> tuple[int, int]:
        rows, columns = shapes[matrix]
        return rows_of(holder, rows, ranks), columns

    asked = [[piece(matrix, holder) for matrix in owned[rank]] for holder in range(ranks)]
    gathered = exchange([[parts[matrix] for matrix in own] for own in owned], asked, parts[0], group)
    results = [function(torch.cat(pieces)) for pieces in zip(*gathered, strict=True)]
    cut = [
        result.split([rows for rows, _ in sizes])
        for result, sizes in zip(results, zip(*asked, strict=True), strict=True)
    ]
    returned = exchange(
        [[pieces[holder] for pieces in cut] for holder in range(ranks)],
        [[piece(matrix, rank) for matrix in own] for own in owned],
        parts[0],
        group,
    )
    by_matrix = {matrix: part for own, of_owner in zip(owned, returned, strict=True)
                 for matrix, part in zip(own, of_owner, strict=True)}  # fmt: skip
    return [by_matrix[matrix] for matrix in range(len(shapes))]


def exchange(
    sent: list[list[Tensor]], shapes: list[list[tuple[int, int]]], like: Tensor, group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """Sends the matrices `sent[r]` to rank r of a group, and returns those that came from each, of the given `shapes`.

    All are of the dtype and on the device of `like`.
    """
    sizes = [[rows * columns for rows, columns in of_rank] for of_rank in shapes]
    message = torch.cat([like.new_empty(0), *(matrix.flatten() for to_rank in sent for matrix in to_rank)])
    received = message.new_empty(sum(map(sum, sizes)))
    totals = [sum(of_rank) for of_rank in sizes], [sum(matrix.numel() for matrix in to_rank) for to_rank in sent]
    dist.all_to_all_single(received, message, *totals, group=group)
    return [
        [part.view(shape) for part, shape in zip(block.split(of_rank), shape_list, strict=True)]
        for block, of_rank, shape_list in zip(received.split(totals[0]), sizes, shapes, strict=True)
    ]


def rows_of(rank: int, rows: int, ranks: int) -> int:
    """Rows of a matrix that a rank holds, as `Shard(0)` divides them: the last ranks may have fewer, or none."""
    each = -(-rows // ranks)
    return min(max(rows - rank * each, 0), each)


def dealt_out(costs: list[int], ranks: int) -> list[list[int]]:
    """For each rank the indices of the tasks it takes: the dearest first, each to the rank that has least to do."""
    owned: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        load, rank = heapq.heappop(loads)
        owned[rank].append(task)
        heapq.heappush(loads, (load + costs[task], rank))
    return owned


def orthogonalization_flops(rows: int, columns: int) -> int:
    """FLOPs of five steps of Newton-Schulz on one matrix: in each X X^T, its square, and their product with X."""
    short, long = sorted((rows, columns))
    return 5 * (4 * short**2 * long + 2 * short**3)


@dataclass(frozen=True)
class Kind:
    """What `optimizer.name` stands for."""

    algorithm: type[torch.optim.Optimizer]
    arguments: Callable[[Any], dict]
    """Its keyword arguments, from the `[optimizer]` table; `weight_decay` among them."""
    moments: int
    """Float32 numbers it keeps of every parameter."""
    hidden: "Kind | None" = None
    """What updates the hidden matrices (`models.counts.hidden_matrices`) in its place; None: it updates all."""

    def state_numbers(self, parameters: int, hidden: int) -> int:
        """Float32 numbers of its state, of all ranks together.

        Args:
            parameters: of the model.
            hidden: those of them that are in hidden matrices.
        """
        return self.moments * parameters + ((self.hidden or self).moments - self.moments) * hidden


def _of_adam(table: Any) -> dict:
    return {
        "lr": table.lr,
        "betas": (table.beta1, table.beta2),
        "eps": table.eps,
        "weight_decay": table.weight_decay,
        "fused": table.implementation == "fused",
        "foreach": table.implementation == "foreach",
    }


def _of_muon(table: Any) -> dict:
    # Scaled so that an update's root mean square is AdamW's, one rate and one decay serve both (arXiv 2502.16982).
    return {
        "lr": table.lr,
        "momentum": table.momentum,
        "weight_decay": table.weight_decay,
        "adjust_lr_fn": "match_rms_adamw",
    }


_ADAMW = Kind(AdamW, _of_adam, moments=2)
OPTIMIZERS = {
    "AdamW": _ADAMW,
    "Adam": Kind(Adam, _of_adam, moments=2),
    "Muon": replace(_ADAMW, hidden=Kind(Muon, _of_muon, moments=1)),
}

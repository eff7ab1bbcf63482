"""Packed documents: where each token stands in its document, and documents that have a state each.

Within a row of tokens a document ends where the next begins, and the recurrence starts anew. `positions` [B, T], the
index of each token in its document, says where. Every backend resets in one pass by it: a row's first document takes
the initial state, its last leaves the final one. `cu_seqlens` [N+1], the boundaries of N documents in one row, become
positions; only where each of the N documents has a state of its own do they run one after another.

    positions = document_positions(torch.tensor([0, 3, 3, 7]), q)          # [[0, 1, 2, 0, 1, 2, 3]]
"""

from collections.abc import Callable

import torch
from torch import Tensor

from torchtitan_deltaproduct.ops.library import fake, operator
from torchtitan_deltaproduct.ops.normalize import compute_dtype


def check_boundaries(cu_seqlens: Tensor, length: int) -> None:
    """Raises ValueError unless the boundaries rise from 0 to `length`; looks only if they are on the CPU."""
    if cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        shown = ", ".join(map(str, bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]))
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {length}; found [{shown}]")


@operator("document_positions")
def document_positions(cu_seqlens: Tensor, like: Tensor) -> Tensor:
    """Index of each token in its document [1, T] int32, without a device synchronisation.

    An op, so that a compiled graph does not look inside.

    Args:
        cu_seqlens: [N+1] boundaries from 0 to T; documents may be empty.
        like: [1, T, ...], for T and the device.

    Raises:
        ValueError: boundaries on the CPU that do not rise from 0 to T.
    """
    length = like.shape[1]
    check_boundaries(cu_seqlens, length)
    bounds = cu_seqlens.to(like.device, torch.int64, non_blocking=True)
    token = torch.arange(length, device=like.device)
    start = bounds[torch.searchsorted(bounds[1:], token, right=True)]
    return (token - start).int().unsqueeze(0)


@fake(document_positions)
def _(cu_seqlens: Tensor, like: Tensor) -> Tensor:
    return like.new_empty(1, like.shape[1], dtype=torch.int32)


def one_by_one(
    operator: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    n: int,
) -> tuple[Tensor, Tensor]:
    """Runs `operator(q, k, v, g, beta, initial_state)` on each document; differentiable by autograd.

    Returns:
        o [1, T, H, V] and the final state [N, H, K, V] of every document; an empty one hands its initial state on.
    """
    check_boundaries(cu_seqlens, q.shape[1])
    bounds, outputs, states = cu_seqlens.tolist(), [], []
    for i, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        state = None if initial_state is None else initial_state[i : i + 1]
        if stop > start:
            tokens, rows = slice(start, stop), slice(start * n, stop * n)
            gate = None if g is None else g[:, tokens]
            o, state = operator(q[:, tokens], k[:, rows], v[:, rows], gate, beta[:, rows], state)
            outputs.append(o)
        states.append(q.new_zeros(1, *q.shape[2:], v.shape[3]) if state is None else state)
    dtype = compute_dtype(q, k, v)
    return torch.cat(outputs, 1), torch.cat([state.to(dtype) for state in states])

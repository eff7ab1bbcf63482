"""Packed documents with states: the dense chunkwise path, run once per document.

Training needs neither an initial nor a final state, and there `chunk.py` masks document boundaries inside its
chunks, with static shapes. Prefill and evaluation of packed documents do need them; they run document by
document.

    o, states = forward(q, k, v, g, beta, None, cu_seqlens, scale=0.125, use_qk_l2norm=True)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchtitan_deltaproduct.ops.chunk import chunk_backward, chunk_forward
from torchtitan_deltaproduct.ops.normalize import compute_dtype


def check_boundaries(cu_seqlens: Tensor, length: int) -> None:
    """Raises ValueError unless the boundaries rise from 0 to `length`; looks only if they are on the CPU."""
    if cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        shown = ", ".join(map(str, bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]))
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {length}; found [{shown}]")


def _documents(cu_seqlens: Tensor, n: int) -> Iterator[tuple[int, slice, slice]]:
    """(index, tokens, rows) of every document that has a token."""
    bounds = cu_seqlens.tolist()
    for i, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if stop > start:
            yield i, slice(start, stop), slice(start * n, stop * n)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    *,
    scale: float,
    use_qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:
    """o [1, T, H, V] and the final state [N, H, K, V] of every document; empty ones keep theirs."""
    options = {"scale": scale, "use_qk_l2norm": use_qk_l2norm}
    o = v.new_empty(*q.shape[:3], v.shape[3])
    shape = (cu_seqlens.shape[0] - 1, q.shape[2], q.shape[3], v.shape[3])
    states = torch.zeros(shape, dtype=compute_dtype(q, k, v), device=q.device)
    if initial_state is not None:
        states.copy_(initial_state)
    for i, tokens, rows in _documents(cu_seqlens, k.shape[1] // max(q.shape[1], 1)):
        gate = None if g is None else g[:, tokens]
        o[:, tokens], states[i : i + 1], _, _ = chunk_forward(
            q[:, tokens], k[:, rows], v[:, rows], gate, beta[:, rows], states[i : i + 1], None, **options
        )
    return o, states


def backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    *,
    scale: float,
    use_qk_l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients as `chunk_backward` returns them, over all documents."""
    options = {"scale": scale, "use_qk_l2norm": use_qk_l2norm}
    dq, dk, dv, dg, dbeta = (None if x is None else x.new_zeros(x.shape) for x in (q, k, v, g, beta))
    shape = (cu_seqlens.shape[0] - 1, q.shape[2], q.shape[3], v.shape[3])
    dinitial = torch.zeros(shape, dtype=compute_dtype(q, k, v), device=q.device)
    if dstate is not None:
        dinitial.copy_(dstate)
    for i, tokens, rows in _documents(cu_seqlens, k.shape[1] // max(q.shape[1], 1)):
        one = slice(i, i + 1)
        inputs = (q[:, tokens], k[:, rows], v[:, rows], None if g is None else g[:, tokens], beta[:, rows])
        state = None if initial_state is None else initial_state[one]
        # How many segments the documents have is not known when shapes are, so nothing was kept.
        saved = chunk_forward(*inputs, state, None, **options)[2:]
        dq[:, tokens], dk[:, rows], dv[:, rows], dgate, dbeta[:, rows], dinitial[one] = chunk_backward(
            do[:, tokens], dinitial[one], *inputs, None, *saved, **options
        )
        if dg is not None:
            dg[:, tokens] = dgate
    return dq, dk, dv, dg, dbeta, dinitial

"""Chunkwise gated DeltaProduct in plain PyTorch: forward and hand-written backward, on any device.

The sequence is cut into segments and a segment into chunks. Within a segment all work is batched over its
chunks (`segment.py` has the algebra); segments follow one another, so that the intermediates of one stay in a
CPU's cache and their memory does not grow with the sequence. Forward keeps the state at the start of each
segment and the error v - read of every row, as large as v in the compute dtype (float32: 4 * B * T * n * H * V
bytes); backward walks the segments in reverse and recomputes the rest.

    options = {"scale": 0.125, "use_qk_l2norm": True}
    o, final_state, starts, errors = chunk_forward(q, k, v, g, beta, None, None, **options)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchtitan_deltaproduct.ops import segment
from torchtitan_deltaproduct.ops.normalize import compute_dtype, full_precision

CPU_CHUNK_ROWS, GPU_CHUNK_ROWS = 32, 64
"""R, rows of a chunk, by `benchmarks/op.py --sweep`: small for a CPU, larger for a GPU (fewer launches)."""

CPU_SEGMENT_ROWS, GPU_SEGMENT_ROWS = 2048, 2**19
"""B * H * rows of a segment. CPU: 512 KiB a tensor at K = 64, by the sweep; GPU: 256 MiB at K = 128."""


def plan(q: Tensor, k: Tensor, chunk_rows: int | None = None, segment_rows: int | None = None) -> tuple[int, int]:
    """(tokens a chunk, tokens a segment); the second is a multiple of the first."""
    batch, length, heads, _ = q.shape
    n, cpu = k.shape[1] // max(length, 1), q.device.type == "cpu"
    chunk_rows = chunk_rows or (CPU_CHUNK_ROWS if cpu else GPU_CHUNK_ROWS)
    segment_rows = segment_rows or (CPU_SEGMENT_ROWS if cpu else GPU_SEGMENT_ROWS)
    tokens = max(1, min(chunk_rows // max(n, 1), length))
    return tokens, tokens * max(1, segment_rows // max(1, batch * heads * n * tokens))


def saved_shapes(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `starts`, a state for each segment, and of `errors`, R rows for each chunk."""
    batch, length, heads, dim = q.shape
    tokens, span = plan(q, k)
    starts = (-(-length // span), batch * heads, dim, v.shape[3])
    return starts, (-(-length // tokens) * batch * heads, tokens * (k.shape[1] // length), v.shape[3])


class _Segments:
    """Cuts the op's arguments into segments and prepares each on demand."""

    def __init__(self, q, k, v, g, beta, positions, scale, use_qk_l2norm, chunk_rows, segment_rows) -> None:
        self.tensors = (q, k, v, g, beta)
        self.length, self.n = q.shape[1], k.shape[1] // q.shape[1]
        self.tokens, self.span = plan(q, k, chunk_rows, segment_rows)
        self.scale, self.use_qk_l2norm = scale, use_qk_l2norm
        self.dtype = compute_dtype(q, k, v)
        self.document = None
        if positions is not None:
            # A number for each document of a row, of the token before the row first: the first document has the state
            # that enters, the last goes on through the padding.
            number = (positions == 0).cumsum(1)
            padding = -self.length % self.tokens
            self.document = torch.cat([number[:, :1], number, number[:, -1:].expand(-1, padding)], 1)

    def slices(self) -> Iterator[tuple[int, slice, slice]]:
        """(index, tokens, rows) of each segment in order."""
        for i, start in enumerate(range(0, self.length, self.span)):
            stop = min(start + self.span, self.length)
            yield i, slice(start, stop), slice(start * self.n, stop * self.n)

    def chunks(self, tokens: slice) -> slice:
        """A segment's part of the errors."""
        heads = self.tensors[0].shape[0] * self.tensors[0].shape[2]
        return slice(tokens.start // self.tokens * heads, -(-tokens.stop // self.tokens) * heads)

    def values(self, rows: slice) -> Tensor:
        """[NC*B*H, R, V]."""
        return segment.to_chunks(self.tensors[2][:, rows], self.tokens * self.n, self.dtype)

    def prepare(self, tokens: slice, rows: slice) -> segment.Chunks:
        q, k, _, g, beta = self.tensors
        document = self.document
        if document is not None:
            padded = -(-(tokens.stop - tokens.start) // self.tokens) * self.tokens
            document = document[:, tokens.start : tokens.start + padded + 1]
        return segment.prepare(
            q[:, tokens],
            k[:, rows],
            None if g is None else g[:, tokens],
            beta[:, rows],
            document,
            tokens=self.tokens,
            dtype=self.dtype,
            use_qk_l2norm=self.use_qk_l2norm,
        )


# One call a segment: its intermediates are freed before the next allocates, so that the memory stays warm.
def _forward_segment(parts: _Segments, tokens: slice, rows: slice, state: Tensor, o: Tensor, errors: Tensor) -> Tensor:
    """Writes the segment's part of o and of the errors; returns the state after it."""
    c = parts.prepare(tokens, rows)
    reads, state = segment.segment_forward(c, parts.values(rows), state, errors[parts.chunks(tokens)])
    segment.from_chunks(reads.mul_(parts.scale), o[:, tokens])
    return state


def _backward_segment(
    parts: _Segments,
    tokens: slice,
    rows: slice,
    do: Tensor,
    state: Tensor,
    errors: Tensor,
    dstate: Tensor,
    grads: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor],
) -> Tensor:
    """Writes the segment's part of the gradients; returns that of the state before it."""
    dq, dk, dv, dg, dbeta = grads
    c = parts.prepare(tokens, rows)
    dreads = segment.to_chunks(do[:, tokens], parts.tokens, parts.dtype).mul_(parts.scale)
    dqueries, dkeys, dvalues, dgate, dbetas, dstate = segment.segment_backward(
        c, dreads, errors, state, dstate, dg is not None
    )
    if c.rstd is not None:
        k_rstd, q_rstd = c.rstd.split([dkeys.shape[1], parts.tokens], 1)
        segment.norm_backward(dqueries, c.queries, q_rstd)
        segment.norm_backward(dkeys, c.keys, k_rstd)
    segment.from_chunks(dqueries, dq[:, tokens])
    segment.from_chunks(dkeys, dk[:, rows])
    segment.from_chunks(dvalues, dv[:, rows])
    segment.from_chunks(dbetas, dbeta[:, rows].unsqueeze(-1))
    if dg is not None:
        segment.from_chunks(dgate, dg[:, tokens].unsqueeze(-1))
    return dstate


def _from_entering(x: Tensor, entering: Tensor) -> Tensor:
    """[N*B*H, R, V+K], of a pass from [0 | I] -> [N*B*H, R, V], as from the state that enters, [B, H, K, V]."""
    dim, columns = entering.shape[2:]
    entering = entering.flatten(0, 1).to(x.dtype).repeat(x.shape[0] // entering.shape[:2].numel(), 1, 1)
    return torch.baddbmm(x[..., :columns], x[..., columns:], entering)


def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    positions: Tensor | None,
    *,
    scale: float,
    use_qk_l2norm: bool,
    chunk_rows: int | None = None,
    segment_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the operator.

    Args:
        q, k, v, g, beta, initial_state, scale, use_qk_l2norm: as in `gated_delta_product`; n = k's rows /
            q's. An initial state of more columns than v, [B, H, K, D], runs as if v had zeros there: from [0 | I] it
            ends as [Z | P], the affine map of the sequence.
        positions: [B, T] index of each token in its document, or None; the state is reset where it is 0, inside chunks
            by masks, except at the first token of a row.
        chunk_rows: R; by device if None.
        segment_rows: B * H * rows of a segment; by device if None.

    Returns:
        o [B, T, H, V] in v's dtype (D columns: in the compute dtype), the final state [B, H, K, V], and for the
        backward `starts`, the states at the starts of the segments [segments, B*H, K, V], and `errors`, the v - read of
        every row [chunks*B*H, R, V], both in the compute dtype.
    """
    batch, length, heads, dim = q.shape
    columns = v.shape[3] if initial_state is None else initial_state.shape[3]
    state = q.new_zeros(batch * heads, dim, columns, dtype=compute_dtype(q, k, v))
    if initial_state is not None:
        state.copy_(initial_state.flatten(0, 1))
    o = v.new_empty(batch, length, heads, columns, dtype=v.dtype if columns == v.shape[3] else state.dtype)
    starts = []
    with full_precision(q.device.type):
        parts = _Segments(q, k, v, g, beta, positions, scale, use_qk_l2norm, chunk_rows, segment_rows)
        chunks = -(-length // parts.tokens)
        errors = state.new_empty(chunks * batch * heads, parts.tokens * parts.n, columns)
        for _, tokens, rows in parts.slices():
            starts.append(state)
            state = _forward_segment(parts, tokens, rows, state, o, errors)
    return o, state.unflatten(0, (batch, heads)), torch.stack(starts), errors


def chunk_backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    positions: Tensor | None,
    starts: Tensor,
    errors: Tensor,
    *,
    scale: float,
    use_qk_l2norm: bool,
    entering: Tensor | None = None,
    chunk_rows: int | None = None,
    segment_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of q, k, v, g (None without it) and beta, each in its dtype, and of the initial state.

    Args:
        do: [B, T, H, V].
        dstate: [B, H, K, V] or None.
        starts, errors: as `chunk_forward` returned them, for the same `chunk_rows` and `segment_rows`.
        entering: [B, H, K, V] for a forward pass from [0 | I]: the state that it turned out to start from.
    """
    dq, dk, dv, dg, dbeta = (None if x is None else x.new_empty(x.shape) for x in (q, k, v, g, beta))
    carry = starts.new_zeros(*starts.shape[1:3], v.shape[3])
    if dstate is not None:
        carry.copy_(dstate.flatten(0, 1))
    with full_precision(q.device.type):
        parts = _Segments(q, k, v, g, beta, positions, scale, use_qk_l2norm, chunk_rows, segment_rows)
        for i, tokens, rows in reversed(list(parts.slices())):
            state, error = starts[i], errors[parts.chunks(tokens)]
            if entering is not None:
                state, error = _from_entering(state, entering), _from_entering(error, entering)
            carry = _backward_segment(parts, tokens, rows, do, state, error, carry, (dq, dk, dv, dg, dbeta))
    return dq, dk, dv, dg, dbeta, carry.view(q.shape[0], q.shape[2], *carry.shape[1:])

"""Chunkwise gated DeltaProduct in plain PyTorch: forward and hand-written backward, on any device.

A chunk holds C tokens, R = n*C micro-step rows. Its R keys (what the state predicts for them) and its C queries are all
*readers*: with Y = [beta K; scale Q], X the rows written to the state and D the decay from row j to reader i (0 where i
does not see j), `read_i = e_i Y_i S0 + sum_j (Y_i . K_j) D_ij X_j`, e_i the decay since the chunk began. Hence

    M = (Y K^T) . D,  A = M[keys],  X = (I + A)^-1 (beta V - e beta K S0),  O = e Q S0 + M[queries] X
    S1 = e_C S0 + (l . K)^T X,                                               l_j the decay from row j to the chunk's end

(Yang et al. 2024, arXiv 2406.06484, eq. 8-11 for n = 1 without decay; rows of n micro-steps after arXiv 2502.10297.)
Everything inside chunks is batched over all of them; only S0 -> S1 is sequential, two matmuls a chunk. Example:

    o, final_state = chunk_forward(q, k, v, g, beta, None, None, num_householder=2, scale=0.125, use_qk_l2norm=True)
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_deltaproduct.ops.normalize import L2NORM_EPS, compute_dtype, full_precision

MIN_LOG_DECAY = -100.0
"""g is clamped here: exp(-100) < 1e-43, while a sum over -inf or -1e9 would lose every other decay of the chunk."""


def default_chunk_rows(device_type: str) -> int:
    """R, measured with `benchmarks/op.py --sweep`: small on a CPU (cache), larger on a GPU (fewer launches)."""
    return 32 if device_type == "cpu" else 64


@dataclass
class Decays:
    """Decay factors with the document masks multiplied in; None stands for all ones."""

    inside: Tensor
    """D [NC or 1, BH or 1, R+C, R]: reader i (keys first, then queries) from row j; 0 where it must not look."""
    enter: Tensor | None
    """e [NC, BH or 1, R+C, 1]: reader from the chunk's start; 0 if its document began later."""
    leave: Tensor | None
    """l [NC, BH or 1, R, 1]: row to the chunk's end; 0 if its document ended before."""
    across: Tensor | None
    """e_C [NC, BH or 1, 1, 1]: the whole chunk; 0 if the document that entered does not leave."""


@dataclass
class Chunks:
    """What forward and backward both need; every tensor is [NC, B*H, ...] in the compute dtype."""

    keys: Tensor
    """K [R, K], normalised."""
    values: Tensor
    """V [R, V]."""
    beta: Tensor
    """[R, 1]."""
    readers: Tensor
    """Y = [beta K; scale Q] [R+C, K]."""
    scores: Tensor
    """M = (Y K^T) . D [R+C, R]."""
    inverse: Tensor
    """(I + A)^-1 [R, R], unit lower triangular; its entries are bounded by beta (2), whatever the keys."""
    enter: Tensor
    """[-(I + A)^-1 e beta K; e scale Q] [R+C, K]: what S0 adds to X and to O."""
    leave: Tensor
    """l K [R, K]: the rows as X writes them to S1."""
    decays: Decays
    q_rstd: Tensor | None
    k_rstd: Tensor | None


@lru_cache(maxsize=32)
def _visible(tokens: int, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[1, 1, R+C, R] of 0 and 1: a key sees the rows before it, a query those of its token and before."""
    row = torch.arange(tokens * n, device=device)
    keys, queries = row[:, None] > row, row[n - 1 :: n, None] >= row
    return torch.cat([keys, queries]).to(dtype)[None, None]


def _to_chunks(x: Tensor, per_token: int, tokens: int, dtype: torch.dtype) -> Tensor:
    """[B, T*m, H, D] -> a new [NC, B*H, m*C, D], zero-padded to whole chunks."""
    rows = tokens * per_token
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % rows))
    x = x.unflatten(1, (-1, rows)).permute(1, 0, 3, 2, 4)
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).flatten(1, 2)


def _from_chunks(x: Tensor, batch: int, length: int, dtype: torch.dtype) -> Tensor:
    """The inverse: [NC, B*H, m*C, D] -> [B, T*m, H, D] with length = T*m, contiguous."""
    x = x.unflatten(1, (batch, -1)).permute(1, 0, 3, 2, 4)
    if x.shape[0] * x.shape[1] * x.shape[2] == batch * length:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        return out.copy_(x).flatten(1, 2)
    return x.flatten(1, 2)[:, :length].to(dtype, memory_format=torch.contiguous_format)


def _decays(g: Tensor | None, cu_seqlens: Tensor | None, like: Tensor, tokens: int, n: int, length: int) -> Decays:
    """Turns log decays and document boundaries into factors; every exponent is <= 0.

    Args:
        g: [B, T, H] or None.
        cu_seqlens: [N+1] or None.
        like: [NC, B*H, R, K], for shape, dtype and device.
        tokens: C.
        n: micro-steps a token.
        length: T.
    """
    device, dtype, count = like.device, like.dtype, like.shape[0]
    inside = _visible(tokens, n, device, dtype)
    if g is None and cu_seqlens is None:
        return Decays(inside, None, None, None)
    if g is None:
        since = like.new_zeros(count, 1, tokens)
    else:
        since = _to_chunks(g.unsqueeze(-1), 1, tokens, dtype).squeeze(-1).clamp_(min=MIN_LOG_DECAY).cumsum(-1)
    between = (since.unsqueeze(-1) - since.unsqueeze(-2)).clamp_(max=0).exp_()
    enter, leave, across = since.exp(), (since[..., -1:] - since).exp_(), since[..., -1:].exp()
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(device, torch.int64, non_blocking=True)
        document = torch.searchsorted(bounds[1:], torch.arange(count * tokens, device=device), right=True)
        document = document.view(count, 1, tokens)
        entering = F.pad(document[:-1, :, -1:], (0, 0, 0, 0, 1, 0), value=-1)
        between = between * (document.unsqueeze(-1) == document.unsqueeze(-2))
        enter = enter * (document == entering)
        leave = leave * (document == document[..., -1:])
        across = across * (document[..., -1:] == entering)
    between = between.repeat_interleave(n, -1) if n > 1 else between
    readers = torch.cat([between.repeat_interleave(n, -2) if n > 1 else between, between], -2)
    rows = enter.repeat_interleave(n, -1)
    return Decays(
        readers.mul_(inside),
        torch.cat([rows, enter], -1).unsqueeze(-1),
        leave.repeat_interleave(n, -1).unsqueeze(-1),
        across.unsqueeze(-1),
    )


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, cu_seqlens: Tensor | None, n: int,
    scale: float, use_qk_l2norm: bool, tokens: int,
) -> Chunks:  # fmt: skip
    """All that does not depend on the states, batched over chunks."""
    dtype = compute_dtype(q, k, v)
    queries, keys = _to_chunks(q, 1, tokens, dtype), _to_chunks(k, n, tokens, dtype)
    values, betas = _to_chunks(v, n, tokens, dtype), _to_chunks(beta.unsqueeze(-1), n, tokens, dtype)
    q_rstd = k_rstd = None
    if use_qk_l2norm:
        q_rstd, k_rstd = (torch.linalg.vecdot(x, x).add_(L2NORM_EPS).rsqrt_().unsqueeze(-1) for x in (queries, keys))
        queries.mul_(q_rstd)
        keys.mul_(k_rstd)
    rows, decays = keys.shape[-2], _decays(g, cu_seqlens, keys, tokens, n, q.shape[1])
    readers = keys.new_empty(*keys.shape[:2], rows + tokens, keys.shape[-1])
    torch.mul(keys, betas, out=readers[..., :rows, :])
    torch.mul(queries, scale, out=readers[..., rows:, :])
    scores = torch.matmul(readers, keys.mT).mul_(decays.inside)
    eye = torch.eye(rows, dtype=dtype, device=q.device).expand(*keys.shape[:2], rows, rows)
    inverse = torch.linalg.solve_triangular(scores[..., :rows, :], eye, upper=False, unitriangular=True)
    enter = readers.clone() if decays.enter is None else readers * decays.enter
    enter[..., :rows, :] = torch.matmul(inverse, enter[..., :rows, :]).neg_()
    leave = keys if decays.leave is None else keys * decays.leave
    return Chunks(keys, values, betas, readers, scores, inverse, enter, leave, decays, q_rstd, k_rstd)


def _scan_forward(c: Chunks, state: Tensor, keep_states: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sequential part.

    Args:
        state: [B*H, K, V] before the first chunk.
        keep_states: whether to return the state before each chunk, and after the last.

    Returns:
        [NC, B*H, R+C, V], rows X and then e Q S0; the final state; states [NC+1, B*H, K, V] or None.
    """
    rows, across = c.keys.shape[-2], c.decays.across
    out = c.values.new_empty(*c.readers.shape[:-1], c.values.shape[-1])
    out[..., :rows, :] = torch.matmul(c.inverse, c.values * c.beta)
    out[..., rows:, :] = 0
    count = out.shape[0]
    states = state.new_empty(count + 1, *state.shape) if keep_states else None
    leave = c.leave.mT
    for i in range(count):
        if states is not None:
            states[i] = state
        out[i].baddbmm_(c.enter[i], state)
        kept = state if across is None else state * across[i]
        state = torch.baddbmm(kept, leave[i], out[i, :, :rows])
    if states is not None:
        states[count] = state
    return out, state, states


def chunk_tokens(num_householder: int, length: int, rows: int) -> int:
    """C for chunks of about `rows` rows; never more than the sequence is long."""
    return max(1, min(rows // num_householder, length))


def chunk_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, *, num_householder: int, scale: float, use_qk_l2norm: bool,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [B, T, H, V] in v's dtype and the final state [B, H, K, V]; with `cu_seqlens` the state is of no use."""
    batch, length, heads, dim = q.shape
    rows = chunk_rows or default_chunk_rows(q.device.type)
    tokens = chunk_tokens(num_householder, length, rows)
    with full_precision(q.device.type):
        c = _prepare(q, k, v, g, beta, cu_seqlens, num_householder, scale, use_qk_l2norm, tokens)
        state = _initial(initial_state, c, dim)
        out, state, _ = _scan_forward(c, state, keep_states=False)
        rows = c.keys.shape[-2]
        o = out[..., rows:, :] + torch.matmul(c.scores[..., rows:, :], out[..., :rows, :])
        return _from_chunks(o, batch, length, v.dtype), state.view(batch, heads, dim, -1)


def _initial(initial_state: Tensor | None, c: Chunks, dim: int) -> Tensor:
    if initial_state is None:
        return c.keys.new_zeros(c.keys.shape[1], dim, c.values.shape[-1])
    return initial_state.to(c.keys.dtype).flatten(0, 1)


def chunk_backward(
    do: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, *, num_householder: int, scale: float,
    use_qk_l2norm: bool, chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g (None without it), beta and the initial state; recomputes all but its inputs."""
    batch, length, heads, dim = q.shape
    n = num_householder
    rows = chunk_rows or default_chunk_rows(q.device.type)
    tokens = chunk_tokens(n, length, rows)
    with full_precision(q.device.type):
        c = _prepare(q, k, v, g, beta, cu_seqlens, n, scale, use_qk_l2norm, tokens)
        rows = c.keys.shape[-2]
        written, _, states = _scan_forward(c, _initial(initial_state, c, dim), keep_states=True)
        written = written[..., :rows, :]
        reads, dstates = _scan_backward(c, _to_chunks(do, 1, tokens, c.keys.dtype), dstate)
        # From dX to the gradient of the right-hand side beta V - e beta K S0, whose second term is a read.
        drhs = torch.matmul(c.inverse.mT, reads[..., :rows, :])
        torch.neg(drhs, out=reads[..., :rows, :])
        dscores = torch.matmul(reads, written.mT).mul_(c.decays.inside)
        dreaders = torch.matmul(reads, states[:-1].mT)
        if c.decays.enter is not None:
            dreaders.mul_(c.decays.enter)
        dreaders.flatten(0, 1).baddbmm_(dscores.flatten(0, 1), c.keys.flatten(0, 1))
        dkeys = torch.matmul(written, dstates[1:].mT)
        if c.decays.leave is not None:
            dkeys.mul_(c.decays.leave)
        dkeys.flatten(0, 1).baddbmm_(dscores.mT.flatten(0, 1), c.readers.flatten(0, 1))
        dg = None
        if g is not None:
            dg = _gate_gradient(c, dreaders, dkeys, states, dstates, n)
            dg = _from_chunks(dg.unsqueeze(-1), batch, length, g.dtype).squeeze(-1)
        dbeta = torch.linalg.vecdot(drhs, c.values) + torch.linalg.vecdot(dreaders[..., :rows, :], c.keys)
        dkeys.addcmul_(dreaders[..., :rows, :], c.beta)
        dq = _norm_backward(dreaders[..., rows:, :] * scale, c.readers[..., rows:, :] / scale, c.q_rstd)
        dk = _norm_backward(dkeys, c.keys, c.k_rstd)
        return (
            _from_chunks(dq, batch, length, q.dtype),
            _from_chunks(dk, batch, length * n, k.dtype),
            _from_chunks(drhs.mul_(c.beta), batch, length * n, v.dtype),
            dg,
            _from_chunks(dbeta.unsqueeze(-1), batch, length * n, beta.dtype).squeeze(-1),
            dstates[0].view(batch, heads, dim, -1),
        )


def _scan_backward(c: Chunks, do: Tensor, dstate: Tensor | None) -> tuple[Tensor, Tensor]:
    """The reverse scan.

    Args:
        do: [NC, B*H, C, V].
        dstate: gradient of the final state, or None.

    Returns:
        [NC, B*H, R+C, V], rows dX and then dO; the gradient of every state, [NC+1, B*H, K, V].
    """
    rows, across, count = c.keys.shape[-2], c.decays.across, do.shape[0]
    reads = do.new_empty(*c.readers.shape[:-1], do.shape[-1])
    reads[..., rows:, :] = do
    reads[..., :rows, :] = torch.matmul(c.scores[..., rows:, :].mT, do)
    dstates = do.new_zeros(count + 1, do.shape[1], c.keys.shape[-1], do.shape[-1])
    if dstate is not None:
        dstates[count] = dstate.flatten(0, 1)
    enter = c.enter.mT
    for i in reversed(range(count)):
        reads[i, :, :rows].baddbmm_(c.leave[i], dstates[i + 1])
        kept = dstates[i + 1] if across is None else dstates[i + 1] * across[i]
        torch.baddbmm(kept, enter[i], reads[i], out=dstates[i])
    return reads, dstates


def _gate_gradient(c: Chunks, dreaders: Tensor, dkeys: Tensor, states: Tensor, dstates: Tensor, n: int) -> Tensor:
    """Gradient of g [NC, B*H, C].

    With G the running sum of g in the chunk, a reader carries exp(+G_i), a written row exp(-G_j) and the state that
    leaves exp(G_C): d/dG is the product of each with its own gradient.
    """
    rows = c.keys.shape[-2]
    reader = torch.linalg.vecdot(c.readers, dreaders)
    row = reader[..., :rows] - torch.linalg.vecdot(c.keys, dkeys)
    token = row.unflatten(-1, (-1, n)).sum(-1) + reader[..., rows:]
    token[..., -1] += (states[1:] * dstates[1:]).sum((-1, -2))
    return token.flip(-1).cumsum(-1).flip(-1)


def _norm_backward(dy: Tensor, y: Tensor, rstd: Tensor | None) -> Tensor:
    """Gradient of x from that of y = x * rstd, rstd = (|x|^2 + eps)^-1/2; exact with the eps. Overwrites dy."""
    if rstd is None:
        return dy
    return dy.addcmul_(y, torch.linalg.vecdot(y, dy).unsqueeze(-1), value=-1).mul_(rstd)

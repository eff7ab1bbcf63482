"""The algebra of the chunkwise form, batched over the chunks of one segment of the sequence.

A chunk holds C tokens, R = n*C micro-step rows. Its R keys and its C queries are both *readers* of the state:
with Y = [-beta K; scale Q] [R+C, K], X [R, V] the rows written to the state, D_ij the decay from row j to
reader i (0 where i does not see j) and e_i the decay since the chunk began,

    read_i = e_i Y_i S0 + sum_j N_ij X_j,                 N = (Y K^T) . D
    X = beta V + read[keys] = (I - N[keys])^-1 (beta V + e Y S0),   O = read[queries]
    S1 = e_C S0 + (l . K)^T X,                            l_j the decay from row j to the chunk's end

N[keys] is strictly lower triangular: a unit triangular solve. This is the chunkwise form of DeltaNet (arXiv
2406.06484) with n rows a token (arXiv 2502.10297). Only S0 -> S1 is sequential.

    c = prepare(q, k, v, g, beta, document, tokens=16, scale=0.125, use_qk_l2norm=True)
    out, states = scan_forward(c, state, queries=True)
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_deltaproduct.ops.normalize import L2NORM_EPS, compute_dtype

MIN_LOG_DECAY = -100.0
"""g is clamped here: exp(-100) < 1e-43, a sum over -inf or -1e9 loses all other decays."""


@dataclass
class Decays:
    """Decay factors with the document masks multiplied in; None stands for all ones."""

    suffix: Tensor
    """[NC or 1, 1, C, C] of 0 and 1: whether token s (column) is of the document of token t >= s (row)."""
    inside: Tensor
    """D [NC or 1, BH or 1, R+C, R]: reader (keys first, then queries) from row; 0 where it must not look."""
    enter: Tensor | None = None
    """e [NC, BH or 1, R+C, 1]: reader from the chunk's start; 0 if its document began later."""
    leave: Tensor | None = None
    """l [NC, BH or 1, R, 1]: row to the chunk's end; 0 if its document ended before."""
    across: Tensor | None = None
    """e_C [NC, BH or 1, 1, 1]: the whole chunk; 0 if the document that entered does not leave."""


@dataclass
class Chunks:
    """What forward and backward both need; tensors are [NC, B*H, ...] in the compute dtype."""

    queries: Tensor
    """Q [C, K], normalised."""
    keys: Tensor
    """K [R, K], normalised."""
    values: Tensor
    """V [R, V]."""
    beta: Tensor
    """[R, 1]."""
    readers: Tensor
    """Y [R+C, K]."""
    scores: Tensor
    """N [R+C, R]."""
    inverse: Tensor
    """(I - N[keys])^-1 [R, R]; its entries stay bounded, for repeated keys too."""
    enter: Tensor
    """e Y, its key rows times the inverse [R+C, K]: what S0 adds to X and to O."""
    leave: Tensor
    """l K [R, K]: the rows as X writes them to S1."""
    decays: Decays
    q_rstd: Tensor | None
    k_rstd: Tensor | None


@lru_cache(maxsize=64)
def _visible(tokens: int, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[1, 1, R+C, R] of 0 and 1: a key sees the rows before it, a query those of its token and before."""
    row = torch.arange(tokens * n, device=device)
    keys, queries = row[:, None] > row, row[n - 1 :: n, None] >= row
    return torch.cat([keys, queries]).to(dtype)[None, None]


@lru_cache(maxsize=64)
def _eye(rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.eye(rows, device=device, dtype=dtype)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """[NC, BH, I, J] @ [NC, BH, J, K], as one batched product (matmul would copy strided operands)."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def to_chunks(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[B, L, H, D] -> a new [NC, B*H, rows, D], zero-padded to whole chunks."""
    if x.shape[1] % rows:
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % rows))
    x = x.unflatten(1, (-1, rows)).permute(1, 0, 3, 2, 4)
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).flatten(1, 2)


def from_chunks(x: Tensor, out: Tensor) -> None:
    """The inverse: writes [NC, B*H, rows, D] to `out` [B, L, H, D], without the padding."""
    x = x.unflatten(1, (out.shape[0], -1)).permute(1, 0, 3, 2, 4)
    if x.shape[1] * x.shape[2] == out.shape[1]:
        out.unflatten(1, x.shape[1:3]).copy_(x)
    else:
        out.copy_(x.flatten(1, 2)[:, : out.shape[1]])


def _decays(g: Tensor | None, document: Tensor | None, like: Tensor, tokens: int, n: int) -> Decays:
    """Turns log decays and document numbers into factors; every exponent is <= 0.

    Args:
        g: [B, L, H] or None.
        document: [1 + NC*C] number of the document of each token, of the one before the segment first; or
            None.
        like: [NC, B*H, R, K], for shape, dtype and device.
        tokens: C.
        n: micro-steps a token.
    """
    inside, suffix = (
        _visible(tokens, n, like.device, like.dtype),
        _visible(tokens, 1, like.device, like.dtype),
    )
    suffix = suffix[..., tokens:, :]
    if g is None and document is None:
        return Decays(suffix, inside)
    if g is None:
        since = like.new_zeros(like.shape[0], 1, tokens)
    else:
        since = (
            to_chunks(g.unsqueeze(-1), tokens, like.dtype).squeeze(-1).clamp_(min=MIN_LOG_DECAY).cumsum(-1)
        )
    between = (since.unsqueeze(-1) - since.unsqueeze(-2)).clamp_(max=0).exp_()
    enter, leave, across = since.exp(), (since[..., -1:] - since).exp_(), since[..., -1:].exp()
    if document is not None:
        entering = document[:-1:tokens].view(-1, 1, 1)
        document = document[1:].view(-1, 1, tokens)
        leaving = document[..., -1:]
        same = document.unsqueeze(-1) == document.unsqueeze(-2)
        between, suffix = between * same, suffix * same
        enter, leave = enter * (document == entering), leave * (document == leaving)
        across = across * (entering == leaving)
    columns = between.repeat_interleave(n, -1)
    return Decays(
        suffix,
        torch.cat([columns.repeat_interleave(n, -2), columns], -2).mul_(inside),
        torch.cat([enter.repeat_interleave(n, -1), enter], -1).unsqueeze(-1),
        leave.repeat_interleave(n, -1).unsqueeze(-1),
        across.unsqueeze(-1),
    )


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    document: Tensor | None,
    *,
    tokens: int,
    scale: float,
    use_qk_l2norm: bool,
) -> Chunks:
    """All that does not depend on the states. `document` as `_decays` takes it, the rest as the op does."""
    dtype, n = compute_dtype(q, k, v), k.shape[1] // q.shape[1]
    rows = tokens * n
    queries, keys, values = to_chunks(q, tokens, dtype), to_chunks(k, rows, dtype), to_chunks(v, rows, dtype)
    betas = to_chunks(beta.unsqueeze(-1), rows, dtype)
    q_rstd = k_rstd = None
    if use_qk_l2norm:
        q_rstd, k_rstd = (
            torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(L2NORM_EPS).rsqrt_()
            for x in (queries, keys)
        )
        queries.mul_(q_rstd)
        keys.mul_(k_rstd)
    decays = _decays(g, document, keys, tokens, n)
    readers = keys.new_empty(*keys.shape[:2], rows + tokens, keys.shape[-1])
    torch.mul(keys, betas.neg(), out=readers[..., :rows, :])
    torch.mul(queries, scale, out=readers[..., rows:, :])
    scores = bmm(readers, keys.mT).mul_(decays.inside)
    eye = _eye(rows, q.device, dtype).expand(*keys.shape[:2], rows, rows)
    # X (I - N) = I from the right: twice as fast as from the left in LAPACK's column-major order.
    inverse = torch.linalg.solve_triangular(
        scores[..., :rows, :].neg(), eye, upper=False, left=False, unitriangular=True
    )
    if decays.enter is None:
        enter = torch.empty_like(readers)
        enter[..., rows:, :] = readers[..., rows:, :]
        enter[..., :rows, :] = bmm(inverse, readers[..., :rows, :])
    else:
        enter = readers * decays.enter
        enter[..., :rows, :] = bmm(inverse, enter[..., :rows, :])
    leave = keys if decays.leave is None else keys * decays.leave
    return Chunks(
        queries, keys, values, betas, readers, scores, inverse, enter, leave, decays, q_rstd, k_rstd
    )


def scan_forward(c: Chunks, state: Tensor, *, queries: bool) -> tuple[Tensor, Tensor]:
    """The sequential part: X, the readings of S0 by the queries, and the states.

    Args:
        c: the prepared chunks.
        state: [B*H, K, V] before the first chunk.
        queries: whether to read for the queries too.

    Returns:
        Rows X [NC, B*H, R, V], with `queries` followed by C rows e scale Q S0; the state before each chunk
        and after the last, [NC+1, B*H, K, V].
    """
    count, heads, rows, _ = c.keys.shape
    enter, out = c.enter[..., :rows, :], bmm(c.inverse, c.values * c.beta)
    if queries:
        enter, out = c.enter, F.pad(out, (0, 0, 0, c.enter.shape[2] - rows))
    states = state.new_empty(count + 1, *state.shape)
    states[0] = state
    each = states.unbind()
    steps = zip(out.unbind(), out[..., :rows, :].unbind(), enter.unbind(), c.leave.mT.unbind(), strict=True)
    for i, (reading, written, enters, leave) in enumerate(steps):
        reading.baddbmm_(enters, each[i])
        kept = each[i] if c.decays.across is None else each[i] * c.decays.across[i]
        torch.baddbmm(kept, leave, written, out=each[i + 1])
    return out, states


def segment_backward(
    c: Chunks, do: Tensor, state: Tensor, dstate: Tensor, gated: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients over one segment.

    Args:
        c: the prepared chunks.
        do: [NC, B*H, C, V].
        state: [B*H, K, V] before the segment.
        dstate: [B*H, K, V] gradient of the state after it.
        gated: whether to compute the gradient of g.

    Returns:
        d(scale Q) [.., C, K], dK [.., R, K], dV [.., R, V], dg [.., C, 1] or None, dbeta [.., R, 1], each
        [NC, B*H, ...], and the gradient of `state`.
    """
    rows = c.keys.shape[2]
    written, states = scan_forward(c, state, queries=False)
    dwritten, dstates = _scan_backward(c, do, dstate)
    # From dX to the gradient of its right-hand side, beta V plus a reading: keys and queries are one again.
    drhs = bmm(c.inverse.mT, dwritten)
    dreads = torch.cat([drhs, do], -2)
    dscores = bmm(dreads, written.mT).mul_(c.decays.inside)
    dreaders, dkeys = bmm(dreads, states[:-1].mT), bmm(written, dstates[1:].mT)
    if c.decays.enter is not None:
        dreaders.mul_(c.decays.enter)
        dkeys.mul_(c.decays.leave)
    dreaders.flatten(0, 1).baddbmm_(dscores.flatten(0, 1), c.keys.flatten(0, 1))
    dkeys.flatten(0, 1).baddbmm_(dscores.mT.flatten(0, 1), c.readers.flatten(0, 1))
    dg = _gate_gradient(c, dreaders, dkeys, states, dstates) if gated else None
    dkey_readers = dreaders[..., :rows, :]
    dbeta = torch.linalg.vecdot(drhs, c.values).sub_(torch.linalg.vecdot(dkey_readers, c.keys)).unsqueeze(-1)
    dkeys.addcmul_(dkey_readers, c.beta, value=-1)
    return dreaders[..., rows:, :], dkeys, drhs.mul_(c.beta), dg, dbeta, dstates[0]


def _scan_backward(c: Chunks, do: Tensor, dstate: Tensor) -> tuple[Tensor, Tensor]:
    """The reverse scan: gradients of X [NC, B*H, R, V] and of every state [NC+1, B*H, K, V]."""
    count, _, rows, _ = c.keys.shape
    dwritten = bmm(c.scores[..., rows:, :].mT, do)
    dstates = dstate.new_empty(count + 1, *dstate.shape)
    torch.bmm(c.enter[..., rows:, :].mT.flatten(0, 1), do.flatten(0, 1), out=dstates[:-1].flatten(0, 1))
    dstates[-1] = dstate
    each, enters = dstates.unbind(), c.enter[..., :rows, :].mT.unbind()
    steps = list(zip(dwritten.unbind(), c.leave.unbind(), enters, strict=True))
    for i in reversed(range(count)):
        drows, leave, enter = steps[i]
        drows.baddbmm_(leave, each[i + 1])
        each[i].add_(each[i + 1] if c.decays.across is None else each[i + 1] * c.decays.across[i])
        each[i].baddbmm_(enter, drows)
    return dwritten, dstates


def _gate_gradient(c: Chunks, dreaders: Tensor, dkeys: Tensor, states: Tensor, dstates: Tensor) -> Tensor:
    """Gradient of g [NC, B*H, C, 1].

    With G the running sum of g in the chunk, a reader carries exp(+G_i), a written row exp(-G_j) and the
    state that leaves exp(G_C): d/dG is the product of each with its own gradient.
    """
    rows, tokens = c.keys.shape[2], c.readers.shape[2] - c.keys.shape[2]
    reader = torch.linalg.vecdot(c.readers, dreaders)
    row = reader[..., :rows] - torch.linalg.vecdot(c.keys, dkeys)
    token = row.unflatten(-1, (tokens, -1)).sum(-1) + reader[..., rows:]
    token[..., -1] += (states[1:] * dstates[1:]).sum((-1, -2))
    # Later documents of the chunk add up to zero, but only up to their rounding: they are masked out.
    return torch.matmul(token.unsqueeze(-2), c.decays.suffix).mT


def norm_backward(dy: Tensor, y: Tensor, rstd: Tensor | None) -> Tensor:
    """Gradient of x from that of y = x * rstd, rstd = (|x|^2 + eps)^-1/2; may overwrite dy."""
    if rstd is None:
        return dy
    return dy.addcmul_(y, torch.linalg.vecdot(y, dy).unsqueeze(-1), value=-1).mul_(rstd)

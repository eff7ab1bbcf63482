"""The algebra of the chunkwise form, batched over the chunks of one segment of the sequence.

A chunk holds C tokens, R = n*C micro-step rows. Its R keys and its C queries are both *readers* of the state:
with Y = [K; Q] [R+C, K], E [R, V] the errors v - read of the delta rule, X = beta E the rows written to the
state, D_ij the decay from row j to reader i (0 where i does not see j) and e_i the decay since the chunk began,

    read_i = e_i Y_i S0 + sum_j N_ij X_j,                 N = (Y K^T) . D
    E = V - read[keys] = (I + N[keys] beta)^-1 (V - e K S0),              O = scale read[queries]
    S1 = e_C S0 + (l . K)^T X,                            l_j the decay from row j to the chunk's end

N[keys] is strictly lower triangular: a unit triangular solve. This is the chunkwise form of DeltaNet (arXiv
2406.06484) with n rows a token (arXiv 2502.10297). Only S0 -> S1 is sequential. Backward is given E, so that
the states follow from a running sum of (l . K)^T X, and has dX = (I + beta N[keys])^-T (dX through O and S1).

    c = prepare(q, k, g, beta, document, tokens=16, dtype=torch.float32, use_qk_l2norm=True)
    reads, state = segment_forward(c, to_chunks(v, 32, torch.float32), state, errors)
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_deltaproduct.ops.normalize import L2NORM_EPS

MIN_LOG_DECAY = -100.0
"""g is clamped here: exp(-100) < 1e-43, a sum over -inf or -1e9 loses all other decays."""


@dataclass
class Decays:
    """Decay factors with the document masks multiplied in; None stands for all ones."""

    inside: Tensor
    """D [NC*BH or 1, R+C, R]: reader (keys first, then queries) from row; 0 where it must not look."""
    enter: Tensor | None = None
    """e [NC*BH, R+C, 1]: reader from the chunk's start; 0 if its document began later."""
    leave: Tensor | None = None
    """l [NC*BH, R, 1]: row to the chunk's end; 0 if its document ended before."""
    across: tuple[Tensor, ...] | None = None
    """e_C [BH, 1, 1] of each chunk: the whole chunk; 0 if the document that entered does not leave."""


@dataclass
class Chunks:
    """What forward and backward both need; tensors are [NC*B*H, ...] in the compute dtype."""

    heads: int
    """BH = B * H: a tensor's `split(heads)` are its chunks."""

    readers: Tensor
    """Y [R+C, K]: keys, then queries, normalised."""
    keys: Tensor
    """K [R, K], a view of them."""
    queries: Tensor
    """Q [C, K], a view of them."""
    rstd: Tensor | None
    """[R+C, 1] what normalised them."""
    beta: Tensor
    """[R, 1]."""
    scores: Tensor
    """N [R+C, R]."""
    decays: Decays


@lru_cache(maxsize=64)
def _visible(tokens: int, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[1, R+C, R] of 0 and 1: a key sees the rows before it, a query those of its token and before."""
    row = torch.arange(tokens * n, device=device)
    keys, queries = row[:, None] > row, row[n - 1 :: n, None] >= row
    return torch.cat([keys, queries]).to(dtype)[None]


@lru_cache(maxsize=64)
def _eye(rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.eye(rows, device=device, dtype=dtype)


def to_chunks(x: Tensor, rows: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """[B, L, H, D] -> [NC*B*H, rows, D], zero-padded to whole chunks; new, or written to `out`."""
    if x.shape[1] % rows:
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % rows))
    batch, length, heads, dim = x.shape
    count = length // rows
    if out is None:
        out = torch.empty(count * batch * heads, rows, dim, dtype=dtype, device=x.device)
    chunks = x.view(batch, count, rows, heads, dim).permute(1, 0, 3, 2, 4)
    out.view(count, batch, heads, rows, dim).copy_(chunks)
    return out


def from_chunks(x: Tensor, out: Tensor) -> None:
    """The inverse: writes [NC*B*H, rows, D] to `out` [B, L, H, D], without the padding."""
    (batch, length, heads, dim), rows = out.shape, x.shape[1]
    x = x.view(-1, batch, heads, rows, dim).permute(1, 0, 3, 2, 4)
    if x.shape[1] * rows == length:
        out.view(x.shape).copy_(x)
    else:
        out.copy_(x.flatten(1, 2)[:, :length])


def _decays(g: Tensor | None, document: Tensor | None, like: Tensor, heads: int, tokens: int) -> Decays:
    """Turns log decays and document numbers into factors; every exponent is <= 0.

    Args:
        g: [B, L, H] or None.
        document: [B, 1 + NC*C] number of the document of each token, of the one before the segment first; or
            None.
        like: [NC*BH, R, K], for shape, dtype and device.
        heads: BH.
        tokens: C.
    """
    n = like.shape[1] // tokens
    inside = _visible(tokens, n, like.device, like.dtype)
    if g is None and document is None:
        return Decays(inside)
    if g is None:
        since = like.new_zeros(like.shape[0], tokens)
    else:
        since = to_chunks(g.unsqueeze(-1), tokens, like.dtype).squeeze(-1)
        since = since.clamp_(min=MIN_LOG_DECAY).cumsum(-1)
    between = (since.unsqueeze(-1) - since.unsqueeze(-2)).clamp_(max=0).exp_()
    enter, leave, across = since.exp(), (since[:, -1:] - since).exp_(), since[:, -1:].exp()
    if document is not None:
        each = heads // document.shape[0]
        entering = document[:, :-1:tokens].t().repeat_interleave(each, 1).reshape(-1, 1)
        document = document[:, 1:].unflatten(1, (-1, tokens)).transpose(0, 1).repeat_interleave(each, 1).flatten(0, 1)
        leaving = document[:, -1:]
        same = document.unsqueeze(-1) == document.unsqueeze(-2)
        between = between * same
        enter, leave = enter * (document == entering), leave * (document == leaving)
        across = across * (entering == leaving)
    columns = between.repeat_interleave(n, -1)
    return Decays(
        torch.cat([columns.repeat_interleave(n, -2), columns], -2).mul_(inside),
        torch.cat([enter.repeat_interleave(n, -1), enter], -1).unsqueeze(-1),
        leave.repeat_interleave(n, -1).unsqueeze(-1),
        across.unsqueeze(-1).split(heads),
    )


def prepare(
    q: Tensor,
    k: Tensor,
    g: Tensor | None,
    beta: Tensor,
    document: Tensor | None,
    *,
    tokens: int,
    dtype: torch.dtype,
    use_qk_l2norm: bool,
) -> Chunks:
    """All that needs neither values nor states. `document` as `_decays` takes it, the rest as the op does."""
    batch, length, heads, dim = q.shape
    heads, rows = batch * heads, tokens * (k.shape[1] // length)
    readers = torch.empty(-(-length // tokens) * heads, rows + tokens, dim, dtype=dtype, device=q.device)
    keys, queries = readers[:, :rows], readers[:, rows:]
    to_chunks(k, rows, dtype, keys)
    to_chunks(q, tokens, dtype, queries)
    rstd = None
    if use_qk_l2norm:
        norm = torch.linalg.vector_norm(readers, dim=-1, keepdim=True)
        rstd = norm.square_().add_(L2NORM_EPS).rsqrt_()
        readers.mul_(rstd)
    decays = _decays(g, document, keys, heads, tokens)
    scores = torch.bmm(readers, keys.mT).mul_(decays.inside)
    betas = to_chunks(beta.unsqueeze(-1), rows, dtype)
    return Chunks(heads, readers, keys, queries, rstd, betas, scores, decays)


def _inverse(lower: Tensor) -> Tensor:
    """(I + A)^-1 [NC*BH, R, R], of which only A's strictly lower part is read.

    A is N beta or beta N: the entries stay bounded, for repeated keys too.
    """
    eye = _eye(lower.shape[-1], lower.device, lower.dtype).expand_as(lower)
    # X (I + A) = I from the right: twice as fast as from the left in LAPACK's column-major order.
    return torch.linalg.solve_triangular(lower, eye, upper=False, left=False, unitriangular=True)


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def segment_forward(c: Chunks, values: Tensor, state: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """One segment.

    Args:
        c: the prepared chunks.
        values: [NC*BH, R, V].
        state: [BH, K, V] before the segment; or more columns, for which values are zero (`ops.shards`).
        errors: [NC*BH, R, V], contiguous, with as many columns as the state; E is written to it.

    Returns:
        What the queries read [NC*BH, C, V], without the scale, and the state after the segment.
    """
    heads, rows = c.heads, c.keys.shape[1]
    inverse = _inverse(c.scores[:, :rows] * c.beta.mT)
    readers, leave = _scaled(c.readers, c.decays.enter), _scaled(c.keys * c.beta, c.decays.leave)
    enter = torch.bmm(inverse, readers[:, :rows])
    if errors.shape == values.shape:
        torch.bmm(inverse, values, out=errors)
    else:
        errors[..., : values.shape[2]] = torch.bmm(inverse, values)
        errors[..., values.shape[2] :] = 0
    states = state.new_empty(errors.shape[0] + heads, *state.shape[1:])
    states[:heads] = state
    each = states.split(heads)
    steps = zip(errors.split(heads), enter.split(heads), leave.mT.split(heads), strict=True)
    for i, (error, enters, leaves) in enumerate(steps):
        error.baddbmm_(enters, each[i], alpha=-1)
        kept = each[i] if c.decays.across is None else each[i] * c.decays.across[i]
        torch.baddbmm(kept, leaves, error, out=each[i + 1])
    reads = torch.bmm(readers[:, rows:], states[:-heads])
    return reads.baddbmm_(c.scores[:, rows:] * c.beta.mT, errors), each[-1].clone()


def segment_backward(
    c: Chunks, do: Tensor, errors: Tensor, state: Tensor, dstate: Tensor, gate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients over one segment.

    Args:
        c: the prepared chunks.
        do: [NC*BH, C, V] gradient of what the queries read.
        errors: E [NC*BH, R, V].
        state: [BH, K, V] before the segment.
        dstate: [BH, K, V] gradient of the state after it.
        gate: whether to make the gradient of g.

    Returns:
        dQ [.., C, K], dK [.., R, K], dV [.., R, V], dg [.., C, 1] or None, dbeta [.., R, 1], each
        [NC*BH, ...], and the gradient of `state`.
    """
    heads, rows = c.heads, c.keys.shape[1]
    readers, leave = _scaled(c.readers, c.decays.enter), _scaled(c.keys, c.decays.leave)
    inverse = _inverse(c.scores[:, :rows] * c.beta)
    written = errors * c.beta
    states = _states(c, leave, written, state)
    enter = torch.bmm(inverse * c.beta.mT, readers[:, :rows])
    dwritten, dstates = _scan_backward(c, do, enter, readers[:, rows:], leave, dstate)
    before, after = states[:-heads].mT, dstates[heads:].mT
    dwritten = torch.bmm(inverse.mT, dwritten)
    dbeta = torch.linalg.vecdot(dwritten, errors).unsqueeze(-1)
    dvalues = dwritten.mul_(c.beta)
    # A key's reading is subtracted from its value: the gradient is -dvalues.
    key_scores, query_scores = torch.bmm(dvalues, written.mT), torch.bmm(do, written.mT)
    within = _within(c, key_scores, query_scores) if gate else None
    key_scores.mul_(c.decays.inside[:, :rows])
    query_scores.mul_(c.decays.inside[:, rows:])
    dq, dk, dreads = torch.bmm(do, before), torch.bmm(written, after), dvalues
    if c.decays.enter is not None:
        dq.mul_(c.decays.enter[:, rows:])
        dk.mul_(c.decays.leave)
        dreads = dvalues * c.decays.enter[:, :rows]
    dg = None
    if gate:
        read = _by_token(torch.linalg.vecdot(c.queries, dq), torch.linalg.vecdot(dreads, torch.bmm(c.keys, before.mT)))
        dg = _gate_gradient(c, within, read, torch.linalg.vecdot(c.keys, dk), states, dstates)
    dq.baddbmm_(query_scores, c.keys)
    dk.baddbmm_(dreads, before, alpha=-1)
    # N[keys] is keys by keys: its gradient reaches them from both sides.
    dk.baddbmm_(key_scores.add_(key_scores.mT.contiguous()), c.keys, alpha=-1)
    dk.baddbmm_(query_scores.mT, c.queries)
    return dq, dk, dvalues, dg, dbeta, dstates[:heads].clone()


def _states(c: Chunks, leave: Tensor, written: Tensor, state: Tensor) -> Tensor:
    """The state before each chunk and after the last [(NC+1)*BH, K, V], from the rows written."""
    states = state.new_empty(written.shape[0] + c.heads, *state.shape[1:])
    torch.bmm(leave.mT, written, out=states[c.heads :])
    states[: c.heads] = state
    each = states.split(c.heads)
    for i in range(len(each) - 1):
        each[i + 1].add_(each[i] if c.decays.across is None else each[i] * c.decays.across[i])
    return states


def _scan_backward(
    c: Chunks, do: Tensor, enter: Tensor, queries: Tensor, leave: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor]:
    """The reverse scan: gradients of X through O and S1 [NC*BH, R, V], of every state [(NC+1)*BH, K, V]."""
    heads, rows = c.heads, c.keys.shape[1]
    dwritten = torch.bmm(c.scores[:, rows:].mT, do)
    dstates = dstate.new_empty(do.shape[0] + heads, *dstate.shape[1:])
    torch.bmm(queries.mT, do, out=dstates[:-heads])
    dstates[-heads:] = dstate
    each = dstates.split(heads)
    steps = list(zip(dwritten.split(heads), leave.split(heads), enter.mT.split(heads), strict=True))
    for i in reversed(range(len(steps))):
        drows, leaves, enters = steps[i]
        drows.baddbmm_(leaves, each[i + 1])
        each[i].add_(each[i + 1] if c.decays.across is None else each[i + 1] * c.decays.across[i])
        each[i].baddbmm_(enters, drows, alpha=-1)
    return dwritten, dstates


def _by_token(queries: Tensor, rows: Tensor) -> Tensor:
    """[NC*BH, C] of a number for each query [.., C] less those of its token's rows [.., R]."""
    return queries - rows.unflatten(-1, (queries.shape[-1], -1)).sum(-1)


def _within(c: Chunks, key_scores: Tensor, query_scores: Tensor) -> Tensor:
    """What the gradient of each g owes to pairs inside the chunk [NC*BH, C].

    A pair has the factor exp(g_s) for every token s after the row and up to the reader: its share, the score times the
    score's gradient, counts for each of them. Every share is added to where it counts; sums of all readers less sums of
    all rows would leave the rounding of near pairs where a strong decay makes the rest small.

    Args:
        key_scores, query_scores: [.., R, R] and [.., C, R], gradients of the scores without decay; of keys negative.
    """
    rows, tokens = c.keys.shape[1], c.queries.shape[1]
    shares = (query_scores * c.scores[:, rows:]).unflatten(2, (tokens, -1)).sum(-1)
    by_key = (key_scores * c.scores[:, :rows]).unflatten(1, (tokens, -1)).sum(2).unflatten(2, (tokens, -1)).sum(-1)
    # [reader, s]: shares of the rows before token s; of those the readers from s on.
    before = torch.cumsum(shares.sub_(by_key), 2).roll(1, 2)
    before[:, :, 0] = 0
    return before.tril_().sum(1)


def _gate_gradient(c: Chunks, within: Tensor, read: Tensor, written: Tensor, states: Tensor, dstates: Tensor) -> Tensor:
    """Gradient of g [NC*BH, C, 1].

    What enters the chunk has decayed by g_s when a token from s on reads it; what a row before s writes has decayed by
    it when it leaves; the state that passes through has decayed by all.

    Args:
        within: of `_within`.
        read: [.., C], a token's readings of the state that entered times their gradients.
        written: [.., R], what a row adds to the state that leaves times its gradient.
    """
    written = written.unflatten(-1, (c.queries.shape[1], -1)).sum(-1)
    after = read.flip(-1).cumsum(-1).flip(-1)
    earlier = written.cumsum(-1) - written
    passing = (states[: -c.heads] * dstates[c.heads :]).sum((-1, -2), keepdim=True)
    if c.decays.across is not None:
        passing = passing * torch.cat(c.decays.across)
    return (within + after + earlier + passing.squeeze(-1)).unsqueeze(-1)


def norm_backward(dy: Tensor, y: Tensor, rstd: Tensor) -> None:
    """Turns dy, the gradient of y = x * rstd, rstd = (|x|^2 + eps)^-1/2, into that of x."""
    dy.addcmul_(y, torch.linalg.vecdot(y, dy).unsqueeze(-1), value=-1).mul_(rstd)

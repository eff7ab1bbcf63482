"""What every chunk needs before the scan: decay factors, query scores P and the solved triangle T.

A chunk is C = 64 // n whole tokens, R = 64 rows (n a token, the last ones unused where n does not divide 64). With G
the running sum of the log decay inside the chunk and D_ij = exp(G_i - G_j) for j before i in the same document,

    A_ij = beta_i D_ij k_i.k_j  (j < i)      T = (I + A)^-1 diag(beta)      P_tj = D_tj q_t.k_j  (j not after token t)

`prepare_kernel` makes the products of a chunk, A in float32; `solve_kernel` inverts, one warp a chunk, by exact block
substitution: never by a Neumann series, whose terms grow without bound at beta = 2 with repeated keys. Its products of
16 x 16 and 32 x 32 are split in three (`FINE`): plain tf32 costs 6e-3 for nearly equal keys. Its loops are not
unrolled: straight-line code of all blocks waits for its own instructions more than for anything else.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MIN_LOG_DECAY = tl.constexpr(-100.0)
"""g is clamped here, as in `ops.segment`: exp(-100) < 1e-43, and a sum over -inf or -1e9 loses all other decays."""


@triton.jit
def _log_decay(g, offsets, mask):
    """g in log2 units, clamped; 0 where masked."""
    gate = tl.load(g + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.maximum(gate, MIN_LOG_DECAY) * LOG2E


@triton.jit(do_not_specialize=["length", "chunks", "H"])
def prepare_kernel(
    q, k, beta, g, positions, prepared, triangles, factors, length, chunks, H,
    K: tl.constexpr, N: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Factors, P and A of one chunk and head.

    Args:
        q: [B, length, H, K].
        k: [B, length * N, H, K].
        beta: [B, length * N, H].
        g: [B, length, H] or None.
        positions: [B, length] int32, index of each token in its document; None: a row is one document.
        prepared: [B*H, chunks, WIDTH] output: P^T [R, CP] after the place of T [R, R], and, with gate or documents,
            enter . q [CP, K] after it.
        triangles: [B*H, chunks, R, R] float32 output, A in blocks of 16 on and below the diagonal.
        factors: [B*H, chunks, 5, R] float32 output: beta, enter, leave, G and across. enter_i is the decay from the
            chunk's start to row i, leave_j from row j to its end, across (one number, R times) from start to end, each
            0 where a document begins in between; G in log2 units. Without gate and documents [B*H, chunks, 1, R], beta.
    """
    c = tl.program_id(0) % chunks
    i_bh = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = i_bh // H, i_bh % H
    r = tl.arange(0, R)
    t = tl.arange(0, CP)
    ck = tl.arange(0, K)
    left = length - c * C
    valid, valid_t = (r < C * N) & (r < left * N), (t < C) & (t < left)
    token = (b * length + c * C) * H + h
    first_row = (b * length + c * C) * (N * H) + h
    prepared += (i_bh * chunks + c) * WIDTH
    triangles += (i_bh * chunks + c) * (R * R)
    factors += (i_bh * chunks + c) * (5 * R if GATED or PACKED else R)
    keys = tl.load(k + first_row * K + r[:, None] * (H * K) + ck[None, :], mask=valid[:, None], other=0.0)
    queries = tl.load(q + token * K + t[:, None] * (H * K) + ck[None, :], mask=valid_t[:, None], other=0.0)
    betas = tl.load(beta + first_row + r * H, mask=valid, other=0.0).to(tl.float32)
    A = tl.dot(keys, tl.trans(keys), input_precision=PREC)
    P = tl.dot(keys, tl.trans(queries), input_precision=PREC)

    below = r[:, None] > r[None, :]
    seen = (r // N)[:, None] <= t[None, :]
    G = tl.zeros([R], tl.float32)
    G_t = tl.zeros([CP], tl.float32)
    if GATED:
        G = tl.cumsum(_log_decay(g, token + (r // N) * H, valid & (r % N == 0)), 0)
        gates = _log_decay(g, token + t * H, valid_t)
        G_t = tl.cumsum(gates, 0)
        total = tl.sum(gates, 0)
        A = A * tl.exp2(tl.where(below, G[:, None] - G[None, :], 0.0))
        P = P * tl.exp2(tl.where(seen, G_t[None, :] - G[:, None], 0.0))
    enter, enter_t = tl.exp2(G), tl.exp2(G_t)
    if GATED:
        leave, across = tl.exp2(total - G), tl.exp2(total)
    else:
        leave, across = enter, tl.max(enter, 0)
    if PACKED:
        # A document's first token counts from the chunk's start; a row's first document has the state that enters.
        at = b * length + c * C
        start = r // N - tl.load(positions + at + r // N, mask=valid, other=0)
        start_t = t - tl.load(positions + at + t, mask=valid_t, other=0)
        last = tl.minimum(C, left) - 1
        last_start = last - tl.load(positions + at + last)
        below = below & ((r // N)[None, :] >= start[:, None])
        seen = seen & ((r // N)[:, None] >= start_t[None, :])
        enter = tl.where((start < 0) | (c * C + start <= 0), enter, 0.0)
        enter_t = tl.where((start_t < 0) | (c * C + start_t <= 0), enter_t, 0.0)
        leave = tl.where(r // N >= last_start, leave, 0.0)
        across = tl.where((last_start < 0) | (c * C + last_start <= 0), across, 0.0)

    # Blocks above the diagonal are never read.
    stored = r[:, None] // 16 >= r[None, :] // 16
    tl.store(triangles + r[:, None] * R + r[None, :], tl.where(below, A * betas[:, None], 0.0), mask=stored)
    out = prepared.dtype.element_ty
    tl.store(prepared + R * R + r[:, None] * CP + t[None, :], tl.where(seen, P, 0.0).to(out))
    tl.store(factors + r, betas)
    if GATED or PACKED:
        entering = (queries.to(tl.float32) * enter_t[:, None]).to(out)
        tl.store(prepared + R * (R + CP) + t[:, None] * K + ck[None, :], entering)
        tl.store(factors + R + r, enter)
        tl.store(factors + 2 * R + r, leave)
        tl.store(factors + 3 * R + r, G)
        tl.store(factors + 4 * R + r, tl.zeros([R], tl.float32) + across)


@triton.jit
def _inverse(A, PREC: tl.constexpr):
    """(I + A)^-1 of a strictly lower 16 x 16 block: exact doubling of inverted diagonal blocks 1, 2, 4, 8."""
    r = tl.arange(0, 16)
    X = tl.where(r[:, None] == r[None, :], 1.0, 0.0) - tl.where(r[:, None] // 2 == r[None, :] // 2, A, 0.0)
    for e in tl.static_range(1, 4):
        pair = r[:, None] // (2 * 2**e) == r[None, :] // (2 * 2**e)
        off = pair & (r[:, None] // (2**e) != r[None, :] // (2**e))
        X = X - tl.dot(X, tl.dot(tl.where(off, A, 0.0), X, input_precision=PREC), input_precision=PREC)
    return X


@triton.jit
def solve_kernel(
    triangles, prepared, factors, R: tl.constexpr, WIDTH: tl.constexpr, FACTORS: tl.constexpr, FINE: tl.constexpr
):
    """T = (I + A)^-1 diag(beta) of one chunk and head: diagonal blocks of 16, pairs of them, the two halves.

    Args:
        triangles: [chunks, R, R] float32, A; overwritten by blocks of (I + A)^-1 on the way.
        prepared: [chunks, WIDTH], T is written at its beginning.
        factors: [chunks, FACTORS], beta at its beginning.
    """
    i = tl.program_id(0).to(tl.int64)
    A, T, beta = triangles + i * (R * R), prepared + i * WIDTH, factors + i * FACTORS
    out = T.dtype.element_ty
    r = tl.arange(0, 16)
    block = r[:, None] * R + r[None, :]
    for j in range(0, 4):
        at = j * (16 * R + 16) + block
        betas = tl.load(beta + j * 16 + r)
        X = _inverse(tl.load(A + at), FINE)
        tl.store(A + at, X)
        tl.store(T + at, (X * betas[None, :]).to(out))
    tl.debug_barrier()
    for j in range(0, 2):
        at = j * (32 * R + 32) + block
        betas = tl.load(beta + j * 32 + r)
        below = tl.dot(tl.load(A + at + 16 * R), tl.load(A + at), input_precision=FINE)
        X = -tl.dot(tl.load(A + at + 16 * R + 16), below, input_precision=FINE)
        tl.store(A + at + 16 * R, X)
        tl.store(T + at + 16 * R, (X * betas[None, :]).to(out))
        tl.store(T + at + 16, tl.zeros([16, 16], out))
    tl.debug_barrier()
    r = tl.arange(0, 32)
    half = r[:, None] * R + r[None, :]
    betas = tl.load(beta + r)
    lower = r[:, None] // 16 >= r[None, :] // 16
    upper_left = tl.load(A + half, mask=lower, other=0.0)
    below = tl.dot(tl.load(A + half + 32 * R), upper_left, input_precision=FINE)
    lower_right = tl.load(A + half + 32 * R + 32, mask=lower, other=0.0)
    X = -tl.dot(lower_right, below, input_precision=FINE)
    tl.store(T + half + 32 * R, (X * betas[None, :]).to(out))
    tl.store(T + half + 32, tl.zeros([32, 32], out))

"""The parallel part of the backward: gradients of q, k, beta and g, one program a chunk and head.

With S the state before the chunk, dS' the gradient of the one after it, D and dX = dV of the scans, and everything
masked to pairs that see each other (j before i; j not after token t), all of one document,

    dA = -dX D^T . decay           dP = scale dO D^T . decay
    dK = -enter (dX S^T) + dA K                       the key that reads
         + dA^T K + dP^T Q + leave (D dS'^T)          the key that is read and writes
    dQ = scale enter (dO S^T) + dP K                  dbeta = dX.D / beta^2

There is no sandwich with T: dA needs only what the scans leave behind. No product takes the transpose of another's
result (see `scan.py`): dA^T comes from a product of its own, dQ is made as dQ^T = K^T dP^T.

The gradient of g: G_i stands in exp(+G) of what row or token i reads and in exp(-G) of what row j writes, and the
derivative of each is the product it stands in. Products within a chunk are summed as scores, dA . (K K^T) and
dP . (Q K^T), with one and the same number for the reader and the row it reads, so that under a strong decay the large
terms of near pairs cancel exactly; pairs of one token have no decay between them and are left out.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length", "chunks", "H"])
def local_kernel(
    q, k, prepared, factors, states, positions, dstates, do, dv, dq, dk, dbeta, dg, scale, length, chunks, H,
    K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr,
    WIDTH: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """dq, dk, dbeta and dg of one chunk, BK columns of dq and dk at a time; arguments as in `scan.py`."""
    c = tl.program_id(0) % chunks
    i_bh = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = i_bh // H, i_bh % H
    r = tl.arange(0, R)
    t = tl.arange(0, CP)
    cv = tl.arange(0, V)
    dt = k.dtype.element_ty
    left = length - c * C
    valid, valid_t = (r < C * N) & (r < left * N), (t < C) & (t < left)
    at = i_bh * chunks + c
    token = (b * length + c * C) * H + h
    first_row = (b * length + c * C) * (N * H) + h
    DECAY: tl.constexpr = GATED or PACKED
    D = states + at * (V * (R + K))
    factors += at * (5 * R if DECAY else R)
    row_v = r[:, None] * (H * V) + cv[None, :]

    # Which pairs see each other, and the decay between them.
    below = r[:, None] > r[None, :]
    above = r[:, None] < r[None, :]
    seen = (r // N)[:, None] <= t[None, :]
    if PACKED:
        row_token = c * C + r // N
        start = row_token - tl.load(positions + b * length + row_token, mask=valid, other=0)
        start_t = c * C + t - tl.load(positions + b * length + c * C + t, mask=valid_t, other=0)
        below = below & (row_token[None, :] >= start[:, None])
        above = above & (row_token[:, None] >= start[None, :])
        seen = seen & (row_token[:, None] >= start_t[None, :])
    if DECAY:
        enter = tl.load(factors + R + r)
        leave = tl.load(factors + 2 * R + r)
        enter_t = tl.load(factors + R + t * N, mask=valid_t, other=0.0)

    # The scores' gradients. The diagonal of dX D^T is beta^2 dbeta: row i writes D_i = beta_i E_i, and dX_i / beta_i is
    # the gradient of what it writes.
    written = tl.load(D + cv[:, None] * R + r[None, :])
    dX = tl.load(dv + first_row * V + row_v, mask=valid[:, None], other=0.0)
    dA = tl.dot(dX, written, input_precision=PREC)
    betas = tl.load(factors + r)
    safe = tl.where(betas == 0.0, 1.0, betas)
    slope = tl.sum(tl.where(r[:, None] == r[None, :], dA, 0.0), 1) / safe / safe
    tl.store(dbeta + first_row + r * H, tl.where(betas == 0.0, 0.0, slope), mask=valid)
    if GATED:
        G = tl.load(factors + 3 * R + r)
        # Rows of the chunk are before tokens that it lacks: any finite number here could be a growth, 0 times infinity.
        G_t = tl.load(factors + 3 * R + t * N, mask=valid_t, other=float("-inf"))
        dA = tl.where(below, -dA * tl.exp2(G[:, None] - G[None, :]), 0.0)
        tok = r // N
        every = r[:, None] * (H * K) + tl.arange(0, K)[None, :]
        all_keys = tl.load(k + first_row * K + every, mask=valid[:, None], other=0.0)
        pair = tl.dot(all_keys, tl.trans(all_keys), input_precision=PREC)
        pair = tl.where(tok[:, None] == tok[None, :], 0.0, pair * dA)
        gate_rows = tl.sum(pair, 1) - tl.sum(pair, 0)
    else:
        dA = tl.where(below, -dA, 0.0)
    dA = dA.to(dt)
    dAT = tl.dot(tl.trans(written), tl.trans(dX), input_precision=PREC)
    if GATED:
        dAT = dAT * tl.exp2(G[None, :] - G[:, None])
    dAT = tl.where(above, -dAT, 0.0).to(dt)
    dreads = tl.load(do + token * V + t[:, None] * (H * V) + cv[None, :], mask=valid_t[:, None], other=0.0)
    dPT = tl.dot(tl.trans(written), tl.trans(dreads), input_precision=PREC) * scale
    if GATED:
        # P, as the forward saved it, has its decay.
        scores = tl.load(prepared + at * WIDTH + R * R + r[:, None] * CP + t[None, :])
        pair = tl.where(tok[:, None] == t[None, :], 0.0, scores.to(tl.float32) * dPT)
        gate_rows -= tl.sum(pair, 1)
        gate_tokens = tl.sum(pair, 0)
        dPT = dPT * tl.exp2(G_t[None, :] - G[:, None])
    dPT = tl.where(seen, dPT, 0.0).to(dt)

    # The gradients of keys and queries. With a gate, all columns at once would not fit in registers.
    if GATED:
        to_end = tl.sum(tl.zeros([16], tl.float32), 0)
        across = tl.load(factors + 4 * R)
    for part in tl.range(0, K // BK, num_stages=STAGES):
        ck = part * BK + tl.arange(0, BK)
        row_k = r[:, None] * (H * K) + ck[None, :]
        state = cv[:, None] * K + ck[None, :]
        column_q = t[None, :] * (H * K) + ck[:, None]
        keys = tl.load(k + first_row * K + row_k, mask=valid[:, None], other=0.0)
        queries = tl.load(q + token * K + t[:, None] * (H * K) + ck[None, :], mask=valid_t[:, None], other=0.0)
        S = tl.load(D + V * R + state)
        dQT = tl.dot(tl.trans(S), tl.trans(dreads), input_precision=PREC) * scale
        if DECAY:
            dQT = dQT * enter_t[None, :]
        if GATED:
            QT = tl.load(q + token * K + column_q, mask=valid_t[None, :], other=0.0)
            gate_tokens += tl.sum(QT.to(tl.float32) * dQT, 0)
        dQT = tl.dot(tl.trans(keys), dPT, dQT, input_precision=PREC)
        tl.store(dq + token * K + column_q, dQT.to(dt), mask=valid_t[None, :])

        # The key that reads the state, and the key that writes it.
        dR = tl.dot(dX, S, input_precision=PREC)
        if DECAY:
            dR = dR * enter[:, None]
        dS = tl.load(dstates + at * (V * K) + state)
        dW = tl.dot(tl.trans(written), dS, input_precision=PREC)
        if DECAY:
            dW = dW * leave[:, None]
        if GATED:
            kept = keys.to(tl.float32)
            carried = tl.sum(kept * dW, 1)
            gate_rows -= tl.sum(kept * dR, 1) + carried
            to_end += tl.sum(carried, 0)
            to_end += tl.sum(tl.sum(S.to(tl.float32) * dS, 1), 0) * across
        dK = dW - dR
        dK = tl.dot(dA, keys, dK, input_precision=PREC)
        dK = tl.dot(dAT, keys, dK, input_precision=PREC)
        dK = tl.dot(dPT, queries, dK, input_precision=PREC)
        tl.store(dk + first_row * K + row_k, dK.to(dt), mask=valid[:, None])

    if GATED:
        # g_s is in every G_t from s to the end of its document.
        rows_after = tok[None, :] >= t[:, None]
        tokens_after = t[None, :] >= t[:, None]
        ends = valid_t
        if PACKED:
            rows_after = rows_after & (c * C + t[:, None] >= start[None, :])
            tokens_after = tokens_after & (c * C + t[:, None] >= start_t[None, :])
            last = tl.minimum(C, left) - 1
            ends = t >= last - tl.load(positions + b * length + c * C + last)
        slope = tl.sum(tl.where(rows_after, gate_rows[None, :], 0.0), 1)
        slope += tl.sum(tl.where(tokens_after, gate_tokens[None, :], 0.0), 1)
        tl.store(dg + token + t * H, slope + tl.where(ends, to_end, 0.0), mask=valid_t)

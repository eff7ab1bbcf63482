"""The sequential part: the state from chunk to chunk, forwards, and its gradient, backwards.

With S the state before a chunk, and T, P and the decay factors of `prepare.py`, all [.., R] or [.., C] rows of a chunk,

    D = T (V - enter K S)        O = scale (enter Q S + P D)        S' = across S + (leave K)^T D
    dD = leave K dS' + scale P^T dO        dX = T^T dD = dV
    dS = across dS' + scale (enter Q)^T dO - (enter K)^T dX

A program carries BV columns of the state of one head. It holds them transposed, S^T [BV, K], so that the state and
everything computed from it is the *first* operand of the next product, which Hopper takes from registers: the chain
S -> K S -> D -> S' never goes through shared memory. What is read, K, Q, T and P, is the second operand, straight from
where the copy engine put it. Products of two products' results, or of their transposes, do not occur (Triton 3.4 to
3.7 miscompiles the latter on Hopper, fla #640).

Few heads and long sequences: the sequence is cut in segments. `MODE` 1 finds the affine map S -> Phi S + Z that a
segment is to any state before it; `combine_kernel` chains the maps; a second pass starts each segment from its state.
"""

import triton
import triton.language as tl


@triton.jit
def _store_chunk(
    states, chunk, at, valid_t, S, D, out, cv, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, SAVE: tl.constexpr
):
    """Stores the outputs of a chunk, at `at`, and for the backward (SAVE) D^T and the state before."""
    if SAVE:
        saved = states + chunk * (V * (R + K))
        tl.store(saved + V * R + cv[:, None] * K + tl.arange(0, K)[None, :], S)
        tl.store(saved + cv[:, None] * R + tl.arange(0, R)[None, :], D)
    tl.store(at, out.to(at.dtype.element_ty), mask=valid_t[None, :])


@triton.jit(do_not_specialize=["length", "chunks", "segment", "H"])
def forward_kernel(
    q, k, v, prepared, factors, states, o, S_in, S_out, scale, length, chunks, segment, H,
    K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr,
    WIDTH: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, SAVE: tl.constexpr, MODE: tl.constexpr,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The scan of one segment for BV columns.

    Args:
        prepared: [B*H, chunks, WIDTH], of `prepare.py`: T, P and, with decays, enter . q.
        states: [B*H, chunks, V * (R + K)] output (SAVE), for the backward: D^T [V, R] and the state before, S^T [V, K].
        o: [B, length, H, V] output (MODE 0).
        S_in: [B*H, segments, V, K] float32, the state before each segment (HAS_IN).
        S_out: float32 output (HAS_OUT): MODE 0 the state after it, [B*H, segments, V, K]; MODE 1 [B*H, segments,
            V + K, K], rows of Z^T, then of Phi^T.
    """
    COLUMNS: tl.constexpr = V if MODE == 0 else V + K
    i_v = tl.program_id(0) % (COLUMNS // BV)
    i_bh = (tl.program_id(0) // (COLUMNS // BV)).to(tl.int64)
    i_s = tl.program_id(1)
    segments = tl.num_programs(1)
    b, h = i_bh // H, i_bh % H
    r = tl.arange(0, R)
    t = tl.arange(0, CP)
    ck = tl.arange(0, K)
    cv = i_v * BV + tl.arange(0, BV)
    dt = k.dtype.element_ty
    FACTORS: tl.constexpr = 5 * R if DECAY else R
    S = tl.zeros([BV, K], tl.float32)
    if HAS_IN:
        S += tl.load(S_in + ((i_bh * segments + i_s) * V + cv[:, None]) * K + ck[None, :])
    if MODE == 1:
        S = tl.where(cv[:, None] == V + ck[None, :], 1.0, S)
    first, last = i_s * segment, tl.minimum((i_s + 1) * segment, chunks)
    row = r[:, None] * (H * K) + ck[None, :]
    query = t[:, None] * (H * K) + ck[None, :]
    value = r[None, :] * (H * V) + cv[:, None]
    reading = t[None, :] * (H * V) + cv[:, None]
    if DECAY:
        across = tl.load(factors + (i_bh * chunks + first) * FACTORS + 4 * R)
    for c in range(first, last):
        record = prepared + (i_bh * chunks + c) * WIDTH
        factor = factors + (i_bh * chunks + c) * FACTORS
        token = (b * length + c * C) * H + h
        first_row = (b * length + c * C) * (N * H) + h
        left = length - c * C
        valid, valid_t = (r < C * N) & (r < left * N), (t < C) & (t < left)
        if DECAY:
            # A number is not pipelined by Triton: it is loaded one chunk ahead.
            ahead = tl.load(factors + (i_bh * chunks + tl.minimum(c + 1, chunks - 1)) * FACTORS + 4 * R)
        keys = tl.load(k + first_row * K + row, mask=valid[:, None], other=0.0)
        solved = tl.load(record + r[:, None] * R + r[None, :])
        mask = valid[None, :] if MODE == 0 else valid[None, :] & (cv[:, None] < V)
        values = tl.load(v + first_row * V + value, mask=mask, other=0.0)
        if DECAY:
            enter, leave = tl.load(factor + R + r), tl.load(factor + 2 * R + r)
        Sb = S.to(dt)
        X = -tl.dot(Sb, tl.trans(keys), input_precision=PREC)
        if DECAY:
            X = X * enter[None, :]
        # Two products with T, not one with a difference: V goes straight from the copy engine to the tensor cores.
        Dt = tl.dot(values, tl.trans(solved), input_precision=PREC)
        Dt = tl.dot(X.to(dt), tl.trans(solved), Dt, input_precision=PREC)
        Db = Dt.to(dt)
        if MODE == 0:
            if DECAY:
                queries = tl.load(record + R * (R + CP) + t[:, None] * K + ck[None, :])
            else:
                queries = tl.load(q + token * K + query, mask=valid_t[:, None], other=0.0)
            scores = tl.load(record + R * R + r[:, None] * CP + t[None, :])
            out = tl.dot(Sb, tl.trans(queries), input_precision=PREC)
            out = tl.dot(Db, scores, out, input_precision=PREC) * scale
        # With decays the stores hide the last product, without them they have room before it (measured).
        if MODE == 0 and not DECAY:
            _store_chunk(states, i_bh * chunks + c, o + token * V + reading, valid_t, Sb, Db, out, cv, K, V, R, SAVE)
        if DECAY:
            S = tl.dot((Dt * leave[None, :]).to(dt), keys, S * across, input_precision=PREC)
            across = ahead
        else:
            S = tl.dot(Db, keys, S, input_precision=PREC)
        if MODE == 0 and DECAY:
            _store_chunk(states, i_bh * chunks + c, o + token * V + reading, valid_t, Sb, Db, out, cv, K, V, R, SAVE)
    if HAS_OUT:
        tl.store(S_out + ((i_bh * segments + i_s) * COLUMNS + cv[:, None]) * K + ck[None, :], S)


@triton.jit(do_not_specialize=["length", "chunks", "segment", "H"])
def backward_kernel(
    q, k, prepared, factors, do, dv, dstates, dS_in, dS_out, scale, length, chunks, segment, H,
    K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr,
    WIDTH: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, MODE: tl.constexpr,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The reverse scan of one segment for BV columns of the state's gradient.

    Inside it dS is kept without the factor `scale`, which o's gradient lacks: dS / scale.

    Args:
        do: [B, length, H, V].
        dv: [B, length * N, H, V] output (MODE 0).
        dstates: [B*H, chunks, V, K] output, the gradient of the state after each chunk (MODE 0).
        dS_in: [B*H, segments, V, K] float32, the gradient of the state after each segment (HAS_IN).
        dS_out: [B*H, segments, V, K] float32 output, that of the state before it (HAS_OUT). MODE 1 writes only this.
    """
    i_v = tl.program_id(0) % (V // BV)
    i_bh = (tl.program_id(0) // (V // BV)).to(tl.int64)
    i_s = tl.program_id(1)
    segments = tl.num_programs(1)
    b, h = i_bh // H, i_bh % H
    r = tl.arange(0, R)
    t = tl.arange(0, CP)
    ck = tl.arange(0, K)
    cv = i_v * BV + tl.arange(0, BV)
    dt = k.dtype.element_ty
    FACTORS: tl.constexpr = 5 * R if DECAY else R
    state = ((i_bh * segments + i_s) * V + cv[:, None]) * K + ck[None, :]
    dS = tl.zeros([BV, K], tl.float32)
    if HAS_IN:
        dS += tl.load(dS_in + state) / scale
    first, last = i_s * segment, tl.minimum((i_s + 1) * segment, chunks)
    row = r[:, None] * (H * K) + ck[None, :]
    query = t[:, None] * (H * K) + ck[None, :]
    value = r[None, :] * (H * V) + cv[:, None]
    reading = t[None, :] * (H * V) + cv[:, None]
    if DECAY:
        factor = factors + (i_bh * chunks + last - 1) * FACTORS
        leave, across = tl.load(factor + 2 * R + r), tl.load(factor + 4 * R)
    for i in range(first, last):
        c = first + last - 1 - i
        record = prepared + (i_bh * chunks + c) * WIDTH
        factor = factors + (i_bh * chunks + c) * FACTORS
        token = (b * length + c * C) * H + h
        first_row = (b * length + c * C) * (N * H) + h
        left = length - c * C
        valid, valid_t = (r < C * N) & (r < left * N), (t < C) & (t < left)
        if DECAY:
            # These two are not pipelined by Triton: they are loaded one chunk ahead.
            ahead = factors + (i_bh * chunks + tl.maximum(c - 1, 0)) * FACTORS
            leave_ahead, across_ahead = tl.load(ahead + 2 * R + r), tl.load(ahead + 4 * R)
        keys = tl.load(k + first_row * K + row, mask=valid[:, None], other=0.0)
        if DECAY:
            queries = tl.load(record + R * (R + CP) + t[:, None] * K + ck[None, :])
        else:
            queries = tl.load(q + token * K + query, mask=valid_t[:, None], other=0.0)
        solved = tl.load(record + r[:, None] * R + r[None, :])
        scores = tl.load(record + R * R + r[:, None] * CP + t[None, :])
        dreads = tl.load(do + token * V + reading, mask=valid_t[None, :], other=0.0)
        if DECAY:
            enter = tl.load(factor + R + r)
        dSb = dS.to(dt)
        dD = tl.dot(dSb, tl.trans(keys), input_precision=PREC)
        if DECAY:
            dD = dD * leave[None, :]
        dD = tl.dot(dreads, tl.trans(scores), dD, input_precision=PREC)
        # Stored here, not before: the chain from dS to dD waits for nothing else.
        if MODE == 0:
            tl.store(dstates + (i_bh * chunks + c) * (V * K) + cv[:, None] * K + ck[None, :], (dS * scale).to(dt))
        dX = tl.dot(dD.to(dt), solved, input_precision=PREC)
        if MODE == 0:
            tl.store(dv + first_row * V + value, (dX * scale).to(dt), mask=valid[None, :])
        if DECAY:
            dX = dX * enter[None, :]
            dS = dS * across
            leave, across = leave_ahead, across_ahead
        dS = tl.dot(dreads, queries, dS, input_precision=PREC)
        dS = tl.dot((-dX).to(dt), keys, dS, input_precision=PREC)
    if HAS_OUT:
        tl.store(dS_out + state, dS * scale)


@triton.jit(do_not_specialize=["segments"])
def combine_kernel(
    maps, Z, S_first, S_in, S_last, segments,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr,
    REVERSE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The state before each segment, S_in[s + 1] = Phi_s S_in[s] + Z_s; REVERSE: the gradient after each, backwards.

    Args:
        maps: [B*H, segments, V + K, K] float32, of `forward_kernel` MODE 1: Z^T, Phi^T.
        Z: [B*H, segments, V, K] float32, of `backward_kernel` MODE 1 (REVERSE); else as maps.
        S_first: [B*H, V, K] float32, what the first segment (REVERSE: the last) is given (HAS_IN).
        S_in: [B*H, segments, V, K] float32 output.
        S_last: [B*H, V, K] float32 output, what comes out at the other end (HAS_OUT).
    """
    i_v = tl.program_id(0) % (V // BV)
    i_bh = (tl.program_id(0) // (V // BV)).to(tl.int64)
    ck = tl.arange(0, K)
    cv = i_v * BV + tl.arange(0, BV)
    tile = cv[:, None] * K + ck[None, :]
    S = tl.zeros([BV, K], tl.float32)
    if HAS_IN:
        S += tl.load(S_first + i_bh * (V * K) + tile)
    for i in range(0, segments):
        s = segments - 1 - i if REVERSE else i
        at = i_bh * segments + s
        tl.store(S_in + at * (V * K) + tile, S)
        phi = maps + at * ((V + K) * K) + V * K
        if REVERSE:
            z = tl.load(Z + at * (V * K) + tile)
            step = tl.load(phi + ck[None, :] * K + ck[:, None])
        else:
            z = tl.load(maps + at * ((V + K) * K) + tile)
            step = tl.load(phi + ck[:, None] * K + ck[None, :])
        S = tl.dot(S, step, z, input_precision=PREC)
    if HAS_OUT:
        tl.store(S_last + i_bh * (V * K) + tile, S)

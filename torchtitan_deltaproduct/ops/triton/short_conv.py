"""Kernels of `ops.short_conv`: causal depthwise convolution, SiLU and, if asked for, the L2 norm per head.

A program owns HEADS heads of channels and STREAMS pieces of one row of the batch, STEPS tokens each. It walks
down its pieces, all at once, one token a step; the TAPS-1 inputs before the current one stay in registers, so
that the inputs are read once (and TAPS-1 tokens beside a piece once more). A tile is [STREAMS * HEADS, BLOCK],
one head of one piece a row, and a warp holds whole rows: norms need shuffles only, no shared memory.

Channels without a norm are cut in heads of 128, the last of which may be narrower. Sums are float32. Nothing is
added atomically: each program writes its share of the weight's gradient, which the caller sums.

Importing this needs Triton alone; TRITON_INTERPRET=1 runs the kernels on CPU tensors.
"""

import triton
import triton.language as tl

FORWARD = {"STREAMS": 4, "STEPS": 64, "GROUP": 4, "num_warps": 4}
BACKWARD = {"STREAMS": 4, "STEPS": 64, "GROUP": 2, "num_warps": 4}
"""Pieces a program, tokens a piece, tokens loaded together (each a load in flight), warps."""

CHANNELS = 256
"""Channels a program: a warp reads 512 consecutive bytes of bfloat16."""

PLAIN_HEAD = 128
"""Channels a row of a tile where there is no norm."""


@triton.jit
def _tile(channels, HEAD: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, STREAMS: tl.constexpr, STEPS: tl.constexpr):
    """What the rows of this program's tiles stand for.

    Returns:
        start [R], the first token of each row's piece, counted from the program's first token; head [R]; channel
        [R, BLOCK]; inside [R, BLOCK], whether there is such a channel.
    """
    row = tl.arange(0, STREAMS * HEADS)
    start = row // HEADS * STEPS
    head = tl.program_id(0) * HEADS + row % HEADS
    column = tl.arange(0, BLOCK)[None, :]
    channel = head[:, None] * HEAD + column
    inside = channel < channels
    if HEAD < BLOCK:
        inside = inside & (column < HEAD)
    return start, head, channel, inside


@triton.jit
def _load_taps(weight, channels, HEAD: tl.constexpr, TAPS: tl.constexpr, PADDED_TAPS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, STREAMS: tl.constexpr):
    """The weights [channels, TAPS] of this program as TAPS tiles [R, BLOCK], that of the current token first."""
    index = tl.arange(0, HEADS * BLOCK)
    column = index % BLOCK
    channel = (tl.program_id(0) * HEADS + index // BLOCK) * HEAD + column
    tap = tl.arange(0, PADDED_TAPS)[None, :]
    inside = ((channel < channels) & (column < HEAD))[:, None] & (tap < TAPS)
    values = tl.load(weight + channel[:, None] * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
    taps = ()
    for back in tl.static_range(TAPS):
        one = tl.sum(tl.where(tap == TAPS - 1 - back, values, 0.0), 1)
        one = tl.broadcast_to(tl.reshape(one, [1, HEADS, BLOCK]), [STREAMS, HEADS, BLOCK])
        taps = taps + (tl.reshape(one, [STREAMS * HEADS, BLOCK]),)
    return taps


@triton.jit
def _load_history(x, start, first, length, channel, inside, stride, TAPS: tl.constexpr):
    """The TAPS-1 inputs before each row's piece, the latest first; zero before the beginning of the sequence."""
    history = ()
    for back in tl.static_range(1, TAPS):
        token = start - back
        there = (first + token >= 0) & (first + token < length)
        value = tl.load(x + token[:, None] * stride + channel, mask=there[:, None] & inside, other=0.0)
        history = history + (value.to(tl.float32),)
    return history


@triton.jit
def _load_group(x, token, first, length, channel, inside, stride, GROUP: tl.constexpr):
    """Inputs of GROUP consecutive tokens, in their own type; zero after the end of the sequence."""
    group = ()
    for ahead in tl.static_range(GROUP):
        there = first + token + ahead < length
        value = tl.load(x + (token + ahead)[:, None] * stride + channel, mask=there[:, None] & inside, other=0.0)
        group = group + (value,)
    return group


@triton.jit
def _within_document(value, position, back: tl.constexpr, DOCUMENTS: tl.constexpr):
    """`value` [R, BLOCK] where the token `back` before a token is in the same document, else zero."""
    if DOCUMENTS:
        value = tl.where((position >= back)[:, None], value, 0.0)
    return value


@triton.jit
def _convolve(current, history, taps, position, TAPS: tl.constexpr, DOCUMENTS: tl.constexpr):
    pre = current * taps[0]
    for back in tl.static_range(1, TAPS):
        pre += _within_document(history[back - 1], position, back, DOCUMENTS) * taps[back]
    return pre


@triton.jit
def _shifted(current, history, TAPS: tl.constexpr):
    """The history of the next token."""
    shifted = (current,)
    for back in tl.static_range(TAPS - 2):
        shifted = shifted + (history[back],)
    return shifted


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["length"])
def short_conv_forward(
    x,
    weight,
    positions,
    y,
    ratio,
    length,
    channels,
    x_batch,
    x_row,
    EPS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    TAPS: tl.constexpr,
    PADDED_TAPS: tl.constexpr,
    NORMALISE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    STREAMS: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y [B, T, C] and, with NORMALISE, ratio [B, T, C / HEAD] of x, whose rows are x_row elements apart.

    Grid: (blocks of HEADS heads, blocks of STREAMS * STEPS tokens, B).
    """
    first = tl.program_id(1) * (STREAMS * STEPS)
    start, head, channel, inside = _tile(channels, HEAD, BLOCK, HEADS, STREAMS, STEPS)
    taps = _load_taps(weight, channels, HEAD, TAPS, PADDED_TAPS, BLOCK, HEADS, STREAMS)
    batch = tl.program_id(2).to(tl.int64)
    x += batch * x_batch + first.to(tl.int64) * x_row
    y += (batch * length + first) * channels
    if NORMALISE:
        ratio += (batch * length + first) * (channels // HEAD)
    if DOCUMENTS:
        positions += batch * length + first
    history = _load_history(x, start, first, length, channel, inside, x_row, TAPS)
    for step in range(0, STEPS, GROUP):
        group = _load_group(x, start + step, first, length, channel, inside, x_row, GROUP)
        for ahead in tl.static_range(GROUP):
            token = start + step + ahead
            there = first + token < length
            position = token
            if DOCUMENTS:
                position = tl.load(positions + token, mask=there, other=0)
            current = group[ahead].to(tl.float32)
            pre = _convolve(current, history, taps, position, TAPS, DOCUMENTS)
            history = _shifted(current, history, TAPS)
            value = pre * _sigmoid(pre)
            if NORMALISE:
                square = tl.sum(value * value, 1)
                rstd = tl.rsqrt(square + EPS)
                value = value * rstd[:, None]
            value = value.to(y.dtype.element_ty)
            if NORMALISE:
                rounded = value.to(tl.float32)
                rounded = tl.sum(rounded * rounded, 1)
                quotient = tl.where(rounded > 0, square * rstd * rstd / rounded, 1.0)
                there_is_head = there & (head * HEAD < channels)
                tl.store(ratio + token * (channels // HEAD) + head, quotient, mask=there_is_head)
            tl.store(y + token[:, None] * channels + channel, value, mask=there[:, None] & inside)


@triton.jit
def _backward_token(
    current,
    dy,
    position,
    history,
    partial,
    dweight,
    taps,
    EPS: tl.constexpr,
    TAPS: tl.constexpr,
    NORMALISE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """One token's part of every gradient.

    Args:
        partial: gradients of the TAPS-1 inputs before this token, as far as later tokens gave them, the latest
            first.
        dweight: gradients of the taps so far.

    Returns:
        history, partial and dweight for the next token, and the finished gradient of the input TAPS-1 tokens back.
    """
    pre = _convolve(current, history, taps, position, TAPS, DOCUMENTS)
    sigmoid = _sigmoid(pre)
    value = pre * sigmoid
    if NORMALISE:
        rstd = tl.rsqrt(tl.sum(value * value, 1) + EPS)
        along = tl.sum(value * dy, 1) * rstd * rstd
        dy = (dy - value * along[:, None]) * rstd[:, None]
    dpre = dy * (sigmoid + value * (1.0 - sigmoid))
    new_partial = (dpre * taps[0],)
    new_dweight = (dweight[0] + dpre * current,)
    for back in tl.static_range(1, TAPS):
        reaching = _within_document(dpre, position, back, DOCUMENTS)
        new_partial = new_partial + (partial[back - 1] + reaching * taps[back],)
        new_dweight = new_dweight + (dweight[back] + reaching * history[back - 1],)
    return _shifted(current, history, TAPS), new_partial[: TAPS - 1], new_dweight, new_partial[TAPS - 1]


@triton.jit(do_not_specialize=["length"])
def short_conv_backward(
    x,
    weight,
    positions,
    dy,
    dx,
    dweight,
    length,
    channels,
    x_batch,
    x_row,
    EPS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    TAPS: tl.constexpr,
    PADDED_TAPS: tl.constexpr,
    NORMALISE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    STREAMS: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dx [B, T, C] of x and dy [B, T, C]; dweight [programs along T and B, TAPS, C], to be summed by the caller.

    Grid as in the forward. A piece goes on for TAPS-1 tokens after its end, whose outputs depend on its inputs.
    """
    first = tl.program_id(1) * (STREAMS * STEPS)
    start, head, channel, inside = _tile(channels, HEAD, BLOCK, HEADS, STREAMS, STEPS)
    taps = _load_taps(weight, channels, HEAD, TAPS, PADDED_TAPS, BLOCK, HEADS, STREAMS)
    batch = tl.program_id(2).to(tl.int64)
    x += batch * x_batch + first.to(tl.int64) * x_row
    dy += (batch * length + first) * channels
    dx += (batch * length + first) * channels
    if DOCUMENTS:
        positions += batch * length + first
    history = _load_history(x, start, first, length, channel, inside, x_row, TAPS)
    zero = tl.zeros([STREAMS * HEADS, BLOCK], tl.float32)
    sums = (zero,)
    partial = ()
    for _ in tl.static_range(1, TAPS):
        sums = sums + (zero,)
        partial = partial + (zero,)
    for step in range(0, STEPS, GROUP):
        xs = _load_group(x, start + step, first, length, channel, inside, x_row, GROUP)
        dys = _load_group(dy, start + step, first, length, channel, inside, channels, GROUP)
        for ahead in tl.static_range(GROUP):
            token = start + step + ahead
            position = token
            if DOCUMENTS:
                position = tl.load(positions + token, mask=first + token < length, other=0)
            current, grad = xs[ahead].to(tl.float32), dys[ahead].to(tl.float32)
            history, partial, sums, done = _backward_token(
                current, grad, position, history, partial, sums, taps, EPS, TAPS, NORMALISE, DOCUMENTS
            )
            token -= TAPS - 1
            there = (step + ahead >= TAPS - 1) & (first + token < length)
            tl.store(dx + token[:, None] * channels + channel, done.to(dx.dtype.element_ty), mask=there[:, None] & inside)
    unused = sums
    for ahead in tl.static_range(TAPS - 1):
        token = start + STEPS + ahead
        position = token
        if DOCUMENTS:
            position = tl.load(positions + token, mask=first + token < length, other=0)
        current = _load_group(x, token, first, length, channel, inside, x_row, 1)[0].to(tl.float32)
        grad = _load_group(dy, token, first, length, channel, inside, channels, 1)[0].to(tl.float32)
        history, partial, unused, done = _backward_token(
            current, grad, position, history, partial, unused, taps, EPS, TAPS, NORMALISE, DOCUMENTS
        )
        token -= TAPS - 1
        there = first + token < length
        tl.store(dx + token[:, None] * channels + channel, done.to(dx.dtype.element_ty), mask=there[:, None] & inside)

    column = tl.arange(0, BLOCK)[None, :]
    channel = (tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None]) * HEAD + column
    inside = (channel < channels) & (column < HEAD)
    program = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    dweight += program.to(tl.int64) * TAPS * channels
    for back in tl.static_range(TAPS):
        total = tl.sum(tl.reshape(sums[back], [STREAMS, HEADS, BLOCK]), 0)
        tl.store(dweight + (TAPS - 1 - back) * channels + channel, total, mask=inside)

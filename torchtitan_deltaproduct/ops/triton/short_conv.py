"""Kernels of `ops.short_conv`: causal depthwise convolution, SiLU and, if asked for, the L2 norm per head.

A program owns HEADS heads of channels and STREAMS pieces of one row of the batch, STEPS tokens each. It walks
down its pieces, all at once, one token a step; the TAPS-1 inputs before the current one stay in registers, so
that the inputs are read once (and TAPS-1 tokens beside a piece once more). A tile is [STREAMS * HEADS, BLOCK],
one head of one piece a row, and up to 128 channels a warp holds whole rows: their norms need shuffles only.

Channels without a norm are cut in heads of 128, the last of which may be narrower. Sums are float32. Nothing is
added atomically: each program writes its share of the weight's gradient, which the caller sums.

Importing this needs Triton alone; TRITON_INTERPRET=1 runs the kernels on CPU tensors.
"""

import triton
import triton.language as tl

FORWARD = {"STREAMS": 4, "STEPS": 64, "GROUP": 4, "num_warps": 4, "enable_fp_fusion": True}
BACKWARD = {"STREAMS": 2, "STEPS": 128, "GROUP": 4, "num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}
"""Pieces a program, tokens a piece, tokens loaded together (each a load in flight), and Triton's options.

A thread of the backward has 4 channels, not 8, and at most 168 registers, so that 12 warps share a multiprocessor. With
8 channels what it remembers of each (4 * TAPS - 2 floats) leaves room for 8 warps, too few to hide the loads.
"""

CHANNELS = 256
"""Channels a program, and the most a head may have."""

PLAIN_HEAD = 128
"""Channels a row of a tile where there is no norm."""


def backward_config(taps: int) -> dict[str, int | bool]:
    """`BACKWARD` for a width: more than 4 taps need more registers, and then shorter groups, not to spill."""
    return BACKWARD | ({} if taps <= 4 else {"GROUP": 2, "maxnreg": 255})


@triton.jit
def _tile(
    channels, HEAD: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, STREAMS: tl.constexpr, STEPS: tl.constexpr
):
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
def _load_taps(
    weight,
    channels,
    HEAD: tl.constexpr,
    TAPS: tl.constexpr,
    PADDED_TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    STREAMS: tl.constexpr,
):
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
def _load_history(x, halo, start, end, inside, stride, channels, TAPS: tl.constexpr, HALO: tl.constexpr):
    """The TAPS-1 inputs before each row's piece, the latest first; before the sequence the halo's (HALO), else zero.

    x [R, BLOCK] points to the first token of each piece; start and end [R] are its distances from the sequence's ends.
    """
    history = ()
    for back in tl.static_range(1, TAPS):
        there = (start >= back) & (end + back > 0)
        value = tl.load(x - back * stride, mask=there[:, None] & inside, other=0.0)
        if HALO:
            before = (start < back)[:, None] & inside
            value += tl.load(halo + (start + (TAPS - 1 - back))[:, None] * channels, mask=before, other=0.0)
        history = history + (value.to(tl.float32),)
    return history


@triton.jit
def _load_group(x, end, inside, stride, GROUP: tl.constexpr):
    """GROUP consecutive tokens from where x points, in their own type; zero from `end` tokens on."""
    group = ()
    for ahead in tl.static_range(GROUP):
        value = tl.load(x + ahead * stride, mask=(end > ahead)[:, None] & inside, other=0.0)
        group = group + (value,)
    return group


@triton.jit
def _document_begins(
    positions,
    first,
    length,
    TAPS: tl.constexpr,
    STREAMS: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """Whether a tap of any of the group's tokens in any piece reaches beyond its document.

    Few groups do, and the selections cost a fifth of a group's instructions. Loads of one number each, so that the
    compiler sees that a warp branches as one.
    """
    begins = False
    if DOCUMENTS:
        least = TAPS
        for stream in tl.static_range(STREAMS):
            for ahead in tl.static_range(GROUP):
                token = stream * STEPS + ahead
                least = tl.minimum(least, tl.load(positions + token, mask=first + token < length, other=TAPS))
        begins = least < TAPS - 1
    return begins


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
    """1 / (1 + e^-x). Triton's exp and its division guard against denormals, three more instructions each."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _forward_group(
    group,
    history,
    taps,
    positions,
    start,
    y,
    ratio,
    end,
    inside,
    heads_inside,
    channels,
    EPS: tl.constexpr,
    HEAD: tl.constexpr,
    TAPS: tl.constexpr,
    NORMALISE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes y and ratio of a group; returns the history of the next token."""
    column = tl.arange(0, GROUP)[None, :]
    quotients = tl.zeros([end.shape[0], GROUP], tl.float32)
    for ahead in tl.static_range(GROUP):
        there = end > ahead
        position = end
        if DOCUMENTS:
            position = tl.load(positions + start + ahead, mask=there, other=0)
        current = group[ahead].to(tl.float32)
        pre = _convolve(current, history, taps, position, TAPS, DOCUMENTS)
        history = _shifted(current, history, TAPS)
        value = pre * _sigmoid(pre)
        if NORMALISE:
            square = tl.sum(value * value, 1)
            rstd = tl.rsqrt(square + EPS)
            value = value * rstd[:, None]
        value = value.to(y.dtype.element_ty)
        tl.store(y + ahead * channels, value, mask=there[:, None] & inside)
        if NORMALISE:
            rounded = value.to(tl.float32)
            rounded = tl.sum(rounded * rounded, 1)
            quotient = square * rstd * rstd / tl.where(rounded > 0, rounded, 1.0)
            quotient = tl.where(rounded > 0, quotient, 1.0)
            quotients = tl.where(column == ahead, quotient[:, None], quotients)
    if NORMALISE:
        there = (end[:, None] > column) & heads_inside[:, None]
        tl.store(ratio + column * (channels // HEAD), quotients, mask=there)
    return history


@triton.jit(do_not_specialize=["length"])
def short_conv_forward(
    x,
    weight,
    positions,
    halo,
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
    HALO: tl.constexpr,
    STREAMS: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y [B, T, C] and, with NORMALISE, ratio [B, T, C / HEAD] of x, whose rows are x_row elements apart.

    With HALO the inputs before the sequence are halo's, [B, TAPS - 1, C].

    Grid: (blocks of HEADS heads, blocks of STREAMS * STEPS tokens, B).
    """
    first = tl.program_id(1) * (STREAMS * STEPS)
    start, head, channel, inside = _tile(channels, HEAD, BLOCK, HEADS, STREAMS, STEPS)
    taps = _load_taps(weight, channels, HEAD, TAPS, PADDED_TAPS, BLOCK, HEADS, STREAMS)
    batch = tl.program_id(2).to(tl.int64)
    x += batch * x_batch + first.to(tl.int64) * x_row + start[:, None] * x_row + channel
    y += (batch * length + first) * channels + start[:, None] * channels + channel
    if NORMALISE:
        heads = channels // HEAD
        ratio += (batch * length + first) * heads + (start * heads + head)[:, None]
    if DOCUMENTS:
        positions += batch * length + first
    end = length - first - start
    if HALO:
        halo += batch * ((TAPS - 1) * channels) + channel
    history = _load_history(x, halo, first + start, end, inside, x_row, channels, TAPS, HALO)
    for step in range(0, STEPS, GROUP):
        group = _load_group(x, end, inside, x_row, GROUP)
        begins = _document_begins(positions, first + step, length, TAPS, STREAMS, STEPS, GROUP, DOCUMENTS)
        if begins:
            history = _forward_group(
                *(group, history, taps, positions, start, y, ratio, end, inside, head * HEAD < channels, channels),
                *(EPS, HEAD, TAPS, NORMALISE, DOCUMENTS, GROUP),
            )
        else:
            history = _forward_group(
                *(group, history, taps, positions, start, y, ratio, end, inside, head * HEAD < channels, channels),
                *(EPS, HEAD, TAPS, NORMALISE, False, GROUP),
            )
        x += GROUP * x_row
        y += GROUP * channels
        if NORMALISE:
            ratio += GROUP * (channels // HEAD)
        if DOCUMENTS:
            positions += GROUP
        end -= GROUP


@triton.jit
def _backward_group(
    xs,
    dys,
    history,
    partial,
    sums,
    taps,
    positions,
    start,
    dx,
    begun,
    end,
    inside,
    channels,
    dhalo,
    begins_row,
    EPS: tl.constexpr,
    TAPS: tl.constexpr,
    NORMALISE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    HALO: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The part of every gradient that comes from a group of outputs; writes dx, finished TAPS-1 tokens before.

    Args:
        partial: gradients of the TAPS-1 inputs before this token, as far as later tokens gave them, the latest first.
        sums: gradients of the taps so far.
        dx: [R, BLOCK] pointers to the group's first token.
        begun: tokens of the piece before the group.
        dhalo: [R, BLOCK] pointers to the halo's gradient; begins_row [R, BLOCK], whether the piece begins the sequence.

    Returns:
        history, partial and sums for the next group.
    """
    for ahead in tl.static_range(GROUP):
        there = end > ahead
        position = end
        if DOCUMENTS:
            position = tl.load(positions + start + ahead, mask=there, other=0)
        current, dy = xs[ahead].to(tl.float32), dys[ahead].to(tl.float32)
        pre = _convolve(current, history, taps, position, TAPS, DOCUMENTS)
        sigmoid = _sigmoid(pre)
        value = pre * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid)
        if NORMALISE:
            rstd = tl.rsqrt(tl.sum(value * value, 1) + EPS)
            along = tl.sum(value * dy, 1) * rstd * rstd
            dy = (dy - value * along[:, None]) * rstd[:, None]
        dpre = dy * slope
        grown, summed = (dpre * taps[0],), (sums[0] + dpre * current,)
        for back in tl.static_range(1, TAPS):
            reaching = _within_document(dpre, position, back, DOCUMENTS)
            grown = grown + (partial[back - 1] + reaching * taps[back],)
            summed = summed + (sums[back] + reaching * history[back - 1],)
        history, partial, sums = _shifted(current, history, TAPS), grown[: TAPS - 1], summed
        there = (begun + ahead >= TAPS - 1) & (end + (TAPS - 1) > ahead)
        done = grown[TAPS - 1].to(dx.dtype.element_ty)
        tl.store(dx + (ahead - (TAPS - 1)) * channels, done, mask=there[:, None] & inside)
        if HALO:
            tl.store(dhalo + (begun + ahead) * channels, done, mask=begins_row & (begun + ahead < TAPS - 1))
    return history, partial, sums


@triton.jit(do_not_specialize=["length"])
def short_conv_backward(
    x,
    weight,
    positions,
    halo,
    dy,
    dx,
    dhalo,
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
    HALO: tl.constexpr,
    STREAMS: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dx [B, T, C] of x and dy [B, T, C]; dweight [programs along T and B, TAPS, C], to be summed by the caller.

    With HALO also dhalo [B, TAPS - 1, C].

    Grid as in the forward. A piece goes on for TAPS-1 tokens after its end, whose outputs depend on its inputs.
    """
    first = tl.program_id(1) * (STREAMS * STEPS)
    start, head, channel, inside = _tile(channels, HEAD, BLOCK, HEADS, STREAMS, STEPS)
    taps = _load_taps(weight, channels, HEAD, TAPS, PADDED_TAPS, BLOCK, HEADS, STREAMS)
    batch = tl.program_id(2).to(tl.int64)
    x += batch * x_batch + first.to(tl.int64) * x_row + start[:, None] * x_row + channel
    here = (batch * length + first) * channels + start[:, None] * channels + channel
    dy += here
    dx += here
    if DOCUMENTS:
        positions += batch * length + first
    end = length - first - start
    if HALO:
        halo += batch * ((TAPS - 1) * channels) + channel
    history = _load_history(x, halo, first + start, end, inside, x_row, channels, TAPS, HALO)
    if HALO:
        dhalo += batch * ((TAPS - 1) * channels) + channel
    begins_row = (first + start == 0)[:, None] & inside
    zero = tl.zeros([STREAMS * HEADS, BLOCK], tl.float32)
    partial, sums = (), (zero,)
    for _ in tl.static_range(1, TAPS):
        partial, sums = partial + (zero,), sums + (zero,)
    for step in range(0, STEPS, GROUP):
        xs = _load_group(x, end, inside, x_row, GROUP)
        dys = _load_group(dy, end, inside, channels, GROUP)
        begins = _document_begins(positions, first + step, length, TAPS, STREAMS, STEPS, GROUP, DOCUMENTS)
        if begins:
            history, partial, sums = _backward_group(
                *(xs, dys, history, partial, sums, taps, positions, start, dx, step, end, inside, channels),
                *(dhalo, begins_row, EPS, TAPS, NORMALISE, DOCUMENTS, HALO, GROUP),
            )
        else:
            history, partial, sums = _backward_group(
                *(xs, dys, history, partial, sums, taps, positions, start, dx, step, end, inside, channels),
                *(dhalo, begins_row, EPS, TAPS, NORMALISE, False, HALO, GROUP),
            )
        x += GROUP * x_row
        dy += GROUP * channels
        dx += GROUP * channels
        if DOCUMENTS:
            positions += GROUP
        end -= GROUP
    xs = _load_group(x, end, inside, x_row, TAPS - 1)
    dys = _load_group(dy, end, inside, channels, TAPS - 1)
    _backward_group(
        *(xs, dys, history, partial, sums, taps, positions, start, dx, STEPS, end, inside, channels),
        *(dhalo, begins_row, EPS, TAPS, NORMALISE, DOCUMENTS, False, TAPS - 1),
    )

    column = tl.arange(0, BLOCK)[None, :]
    channel = (tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None]) * HEAD + column
    inside = (channel < channels) & (column < HEAD)
    program = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    dweight += program.to(tl.int64) * TAPS * channels
    for back in tl.static_range(TAPS):
        total = tl.sum(tl.reshape(sums[back], [STREAMS, HEADS, BLOCK]), 0)
        tl.store(dweight + (TAPS - 1 - back) * channels + channel, total, mask=inside)

"""Causal depthwise convolution, SiLU and the L2 norm per head in one kernel each way (ops.triton.short_conv).

    y, _ = short_conv(x, weight)                                    # x, y: [B, T, C]; weight: [C, W]
    q, _ = short_conv(x, weight, positions, head_dim=128)           # unit length per 128 channels
    k, ratio = short_conv(x, weight, positions, head_dim=128)       # beta * ratio fits the rounded keys
    (q, _), (k, ratio), (v, _) = short_convs([(xq, wq, 128), (xk, wk, 128), (xv, wv, None)], positions)

The definition is `models.conv.sum_of_taps`, SiLU and `ops.normalize.l2norm` in float32, rounded once at the end; it is
also what runs where `obstacle` names a reason. The op keeps x for its backward and computes the rest again.
"""

import importlib.util
import os

import torch
from torch import Tensor

from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.ops.launch import launch, power_of_two
from torchtitan_deltaproduct.ops.library import fake, gradient, no_gradient, operator
from torchtitan_deltaproduct.ops.normalize import L2NORM_EPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = range(2, 9)
MAX_HEAD_DIM = 256

_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def obstacle(x: Tensor, width: int, head_dim: int | None = None) -> str | None:
    """Why the kernels cannot run on x [B, T, C], in one line; None if they can."""
    if not _TRITON:
        return "Triton is not installed (pip install triton, on Linux)"
    if x.device.type != "cuda" and not _INTERPRETED:
        return f"its kernels need CUDA, x is on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"x must be float32, bfloat16 or float16, found {x.dtype}"
    if width not in WIDTHS:
        return f"the width must be {WIDTHS[0]} to {WIDTHS[-1]}, found {width}"
    if head_dim is not None and head_dim > MAX_HEAD_DIM:
        return f"head_dim is {head_dim}, its kernels take at most {MAX_HEAD_DIM}"
    return None


def short_conv(
    x: Tensor,
    weight: Tensor,
    positions: Tensor | None = None,
    *,
    head_dim: int | None = None,
    halo: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """silu(sum_i weight_i x_{t-W+1+i}), with `head_dim` divided by its length per head.

    Args:
        x: [B, T, C] float32, bfloat16 or float16; any strides over B and T.
        weight: [C, W], W from 2 to 8, the current token's last.
        positions: [B, T] integer, index of each token in its document, or None: a row is a document. A tap that
            reaches beyond the document reads zero.
        head_dim: channels a head; C is a multiple of it. None: no norm.
        halo: [B, W-1, C] in x's dtype, the inputs before x if x is only a part of the row; None: zeros.

    Returns:
        y [B, T, C] in x's dtype and, with `head_dim`, |y exact|^2 / |y rounded|^2 [B, T, C / head_dim] float32 (1
        where y is zero), a constant for autograd; else None.

    Raises:
        ConfigError: the kernels cannot run this.
    """
    return short_convs([(x, weight, head_dim)], positions, None if halo is None else [halo])[0]


def short_convs(
    parts: list[tuple[Tensor, Tensor, int | None]],
    positions: Tensor | None = None,
    halos: list[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor | None]]:
    """`short_conv` of several (x, weight, head_dim) over the same tokens, as one op: the host pays for it once."""
    for x, weight, head_dim in parts:
        reason = obstacle(x, weight.shape[1], head_dim)
        if reason is not None:
            raise ConfigError(f"the fused short convolution cannot run: {reason}")
    xs, weights, head_dims = zip(*parts, strict=True)
    out = FORWARD(list(xs), list(weights), positions, [head_dim or 0 for head_dim in head_dims], halos or [])
    pairs = zip(out[::2], out[1::2], head_dims, strict=True)
    return [(y, None if head_dim is None else ratio.detach()) for y, ratio, head_dim in pairs]


@operator("short_convs")
def _forward(
    xs: list[Tensor], weights: list[Tensor], positions: Tensor | None, head_dims: list[int], halos: list[Tensor]
) -> list[Tensor]:
    """y and ratio of each, one after the other; head_dim 0 stands for none, its ratio has no elements."""
    from torchtitan_deltaproduct.ops.triton import short_conv as kernels

    positions, results = None if positions is None else positions.contiguous(), []
    for x, weight, head_dim, halo in zip(xs, weights, head_dims, halos or [None] * len(xs), strict=True):
        y, ratio = outputs(x, head_dim)
        x, weight, halo = _unit_stride(x), weight.contiguous(), None if halo is None else halo.contiguous()
        grid, options = configuration(x, weight, positions, head_dim, halo, kernels.FORWARD)
        launch(kernels.short_conv_forward, grid, x, weight, positions, halo, y, ratio, *sizes(x), **options)
        results += [y, ratio]
    return results


@fake(_forward)
def _(xs, weights, positions, head_dims, halos):
    return [out for x, head_dim in zip(xs, head_dims, strict=True) for out in outputs(x, head_dim)]


def outputs(x: Tensor, head_dim: int | None) -> tuple[Tensor, Tensor]:
    """y and the ratio, not yet written."""
    heads = (*x.shape[:2], x.shape[2] // head_dim) if head_dim else (0,)
    return x.new_empty(x.shape), x.new_empty(heads, dtype=torch.float32)


@operator("short_convs_backward")
def _backward(
    dys: list[Tensor],
    xs: list[Tensor],
    weights: list[Tensor],
    positions: Tensor | None,
    head_dims: list[int],
    halos: list[Tensor],
) -> list[Tensor]:
    """dx [B, T, C] in x's dtype and dweight [C, W] float32 of each, one after the other; then dhalo of each halo."""
    from torchtitan_deltaproduct.ops.triton import short_conv as kernels

    positions, results = None if positions is None else positions.contiguous(), []
    dhalos = [torch.empty_like(halo, memory_format=torch.contiguous_format) for halo in halos]
    each = [(halo.contiguous(), dhalo) for halo, dhalo in zip(halos, dhalos, strict=True)] or [(None, None)] * len(xs)
    for dy, x, weight, head_dim, (halo, dhalo) in zip(dys, xs, weights, head_dims, each, strict=True):
        x, weight = _unit_stride(x), weight.contiguous()
        config = kernels.backward_config(weight.shape[1])
        grid, options = configuration(x, weight, positions, head_dim, halo, config)
        dx = x.new_empty(x.shape)
        shares = x.new_empty((grid[1] * grid[2], weight.shape[1], weight.shape[0]), dtype=torch.float32)
        operands = x, weight, positions, halo, dy.contiguous(), dx, dhalo, shares
        launch(kernels.short_conv_backward, grid, *operands, *sizes(x), **options)
        results += [dx, shares.sum(0).t()]
    return results + dhalos


@fake(_backward)
def _(dys, xs, weights, positions, head_dims, halos):
    pairs = zip(xs, weights, strict=True)
    grads = [g for x, w in pairs for g in (x.new_empty(x.shape), x.new_empty(w.shape[::-1], dtype=torch.float32).t())]
    return grads + [halo.new_empty(halo.shape) for halo in halos]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def sizes(x: Tensor) -> tuple[int, int, int, int]:
    """The kernels' length, channels, x_batch and x_row."""
    return x.shape[1], x.shape[2], x.stride(0), x.stride(1)


def configuration(
    x: Tensor,
    weight: Tensor,
    positions: Tensor | None,
    head_dim: int | None,
    halo: Tensor | None,
    config: dict[str, int],
) -> tuple[tuple[int, int, int], dict[str, int | float | bool]]:
    """The grid and the constants of either kernel."""
    from torchtitan_deltaproduct.ops.triton.short_conv import CHANNELS, PLAIN_HEAD

    assert weight.shape[0] == x.shape[2] and x.shape[2] % (head_dim or 1) == 0, (x.shape, weight.shape, head_dim)
    assert positions is None or positions.shape == x.shape[:2], (x.shape, positions.shape)
    assert halo is None or halo.shape == (x.shape[0], weight.shape[1] - 1, x.shape[2]), (x.shape, halo.shape)
    head, taps = head_dim or PLAIN_HEAD, weight.shape[1]
    block = power_of_two(head)
    heads, tokens = CHANNELS // block, config["STREAMS"] * config["STEPS"]
    grid = -(-x.shape[2] // (head * heads)), -(-x.shape[1] // tokens), x.shape[0]
    constants = {
        "EPS": L2NORM_EPS,
        "HEAD": head,
        "BLOCK": block,
        "HEADS": heads,
        "TAPS": taps,
        "PADDED_TAPS": power_of_two(taps),
        "NORMALISE": bool(head_dim),
        "DOCUMENTS": positions is not None,
        "HALO": halo is not None,
    }
    return grid, constants | config


def _setup_context(ctx, inputs, output) -> None:
    xs, weights, positions, ctx.head_dims, halos = inputs
    ctx.parts = len(xs)
    ctx.save_for_backward(*xs, *weights, *halos, positions)


def _autograd(ctx, grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor], None, None, list[Tensor]]:
    n, (*tensors, positions) = ctx.parts, ctx.saved_tensors
    xs, weights, halos = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
    dys = [torch.zeros_like(x) if dy is None else dy for dy, x in zip(grads[::2], xs, strict=True)]
    out = BACKWARD(dys, xs, weights, positions, ctx.head_dims, halos)
    dweights = [dw.to(w.dtype) for dw, w in zip(out[1 : 2 * n : 2], weights, strict=True)]
    return out[: 2 * n : 2], dweights, None, None, out[2 * n :]


gradient(_forward, _autograd, _setup_context)
no_gradient(_backward)

FORWARD = _forward
BACKWARD = _backward

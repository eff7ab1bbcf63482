"""Causal depthwise convolution, SiLU and the L2 norm per head in one kernel each way (ops.triton.short_conv).

    y, _ = short_conv(x, weight)                                    # x, y: [B, T, C]; weight: [C, W]
    q, _ = short_conv(x, weight, positions, head_dim=128)           # unit length per 128 channels
    k, ratio = short_conv(x, weight, positions, head_dim=128)       # beta * ratio fits the rounded keys

The definition is `models.conv.sum_of_taps`, SiLU and `ops.normalize.l2norm` in float32, rounded once at the end; it is
also what runs where `obstacle` names a reason. The op keeps x for its backward and computes the rest again.
"""

import importlib.util
import os

import torch
from torch import Tensor

from torchtitan_deltaproduct.errors import ConfigError
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
    x: Tensor, weight: Tensor, positions: Tensor | None = None, *, head_dim: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """silu(sum_i weight_i x_{t-W+1+i}), with `head_dim` divided by its length per head.

    Args:
        x: [B, T, C] float32, bfloat16 or float16; any strides over B and T.
        weight: [C, W], W from 2 to 8, the current token's last.
        positions: [B, T] integer, index of each token in its document, or None: a row is a document. A tap that
            reaches beyond the document reads zero.
        head_dim: channels a head; C is a multiple of it. None: no norm.

    Returns:
        y [B, T, C] in x's dtype and, with `head_dim`, |y exact|^2 / |y rounded|^2 [B, T, C / head_dim] float32 (1
        where y is zero), a constant for autograd; else None.

    Raises:
        ConfigError: the kernels cannot run this.
    """
    reason = obstacle(x, weight.shape[1], head_dim)
    if reason is not None:
        raise ConfigError(f"the fused short convolution cannot run: {reason}")
    y, ratio = FORWARD(x, weight, positions, head_dim)
    return y, None if head_dim is None else ratio.detach()


@torch.library.custom_op("deltaproduct::short_conv", mutates_args=())
def _forward(x: Tensor, weight: Tensor, positions: Tensor | None, head_dim: int | None) -> tuple[Tensor, Tensor]:
    """Arguments as in `short_conv`; the ratio has no elements without `head_dim`."""
    from torchtitan_deltaproduct.ops.triton import short_conv as kernels

    y, ratio = outputs(x, head_dim)
    x, weight, positions = _unit_stride(x), weight.contiguous(), None if positions is None else positions.contiguous()
    grid, options = launch(x, weight, positions, head_dim, kernels.FORWARD)
    with torch.cuda.device_of(x):
        kernels.short_conv_forward[grid](x, weight, positions, y, ratio, *sizes(x), **options)
    return y, ratio


@_forward.register_fake
def _(x: Tensor, weight: Tensor, positions: Tensor | None, head_dim: int | None) -> tuple[Tensor, Tensor]:
    return outputs(x, head_dim)


def outputs(x: Tensor, head_dim: int | None) -> tuple[Tensor, Tensor]:
    """y and the ratio, not yet written."""
    heads = (0,) if head_dim is None else (*x.shape[:2], x.shape[2] // head_dim)
    return x.new_empty(x.shape), x.new_empty(heads, dtype=torch.float32)


@torch.library.custom_op("deltaproduct::short_conv_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, positions: Tensor | None, head_dim: int | None
) -> tuple[Tensor, Tensor]:
    """dx [B, T, C] in x's dtype and dweight [C, W] float32."""
    from torchtitan_deltaproduct.ops.triton import short_conv as kernels

    x, weight, positions = _unit_stride(x), weight.contiguous(), None if positions is None else positions.contiguous()
    grid, options = launch(x, weight, positions, head_dim, kernels.backward_config(weight.shape[1]))
    dx = x.new_empty(x.shape)
    shares = x.new_empty((grid[1] * grid[2], weight.shape[1], weight.shape[0]), dtype=torch.float32)
    with torch.cuda.device_of(x):
        kernels.short_conv_backward[grid](x, weight, positions, dy.contiguous(), dx, shares, *sizes(x), **options)
    return dx, shares.sum(0).t().contiguous()


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, positions: Tensor | None, head_dim: int | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(weight.shape, dtype=torch.float32)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def sizes(x: Tensor) -> tuple[int, int, int, int]:
    """The kernels' length, channels, x_batch and x_row."""
    return x.shape[1], x.shape[2], x.stride(0), x.stride(1)


def launch(
    x: Tensor, weight: Tensor, positions: Tensor | None, head_dim: int | None, config: dict[str, int]
) -> tuple[tuple[int, int, int], dict[str, int | float | bool]]:
    """The grid and the constants of either kernel."""
    import triton

    from torchtitan_deltaproduct.ops.triton.short_conv import CHANNELS, PLAIN_HEAD

    assert weight.shape[0] == x.shape[2] and x.shape[2] % (head_dim or 1) == 0, (x.shape, weight.shape, head_dim)
    assert positions is None or positions.shape == x.shape[:2], (x.shape, positions.shape)
    head = head_dim or PLAIN_HEAD
    block = triton.next_power_of_2(head)
    heads = CHANNELS // block
    tokens = config["STREAMS"] * config["STEPS"]
    grid = triton.cdiv(triton.cdiv(x.shape[2], head), heads), triton.cdiv(x.shape[1], tokens), x.shape[0]
    constants = {
        "EPS": L2NORM_EPS,
        "HEAD": head,
        "BLOCK": block,
        "HEADS": heads,
        "TAPS": weight.shape[1],
        "PADDED_TAPS": triton.next_power_of_2(weight.shape[1]),
        "NORMALISE": head_dim is not None,
        "DOCUMENTS": positions is not None,
    }
    return grid, constants | config


def _setup_context(ctx, inputs, output) -> None:
    x, weight, positions, ctx.head_dim = inputs
    ctx.save_for_backward(x, weight, positions)


def _autograd(ctx, dy: Tensor, _dratio: Tensor) -> tuple[Tensor, Tensor, None, None]:
    x, weight, positions = ctx.saved_tensors
    dx, dweight = BACKWARD(dy, x, weight, positions, ctx.head_dim)
    return dx, dweight.to(weight.dtype), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)

FORWARD = torch.ops.deltaproduct.short_conv.default
BACKWARD = torch.ops.deltaproduct.short_conv_backward.default

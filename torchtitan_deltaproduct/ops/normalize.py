"""Number formats of the operator: compute dtype, the L2 norm of queries and keys, the contractive beta.

beta, the decay, norms and the state are float32 whatever the model's dtype (float64 for float64 inputs),
under autocast too:

    with full_precision("cpu"):
        k = l2norm(k.to(compute_dtype(k)))
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

L2NORM_EPS = 1e-6
"""Added to the squared norm, flash-linear-attention's convention."""

ROUNDING = 2.0**-7
"""Bound on the relative error of |k|^2 after rounding a unit key to bfloat16 (2 * 2^-9), doubled."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def full_precision(device_type: str) -> AbstractContextManager:
    """Autocast off: it would lower the operator's float32 matmuls to bfloat16."""
    return torch.autocast(device_type, enabled=False)


def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) over the last dimension, in x's dtype (give it float32)."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2NORM_EPS)


def contractive_beta(k: Tensor, beta: Tensor) -> Tensor:
    """Caps beta |k|^2 at 2 where low-precision keys exceed it by no more than rounding.

    I - beta k k^T has an eigenvalue 1 - beta |k|^2. A key that the caller normalised and then rounded to
    bfloat16 has |k|^2 up to 1.004, so at beta = 2 and without decay the state grows by up to 0.8 % a repeat:
    1e7 times over 4,096 repeats. Keys far from unit length, and float32 or float64 keys, are left as the
    recurrence defines them.

    Args:
        k: [B, T*n, H, K].
        beta: [B, T*n, H].

    Returns:
        beta, float32 for bfloat16 or float16 keys. The cap is a constant for autograd.
    """
    if k.dtype not in (torch.bfloat16, torch.float16):
        return beta
    beta = beta.float()
    square = k.detach().float().square().sum(-1)
    product = beta.detach() * square
    over = (product > 2) & (product <= 2 * (1 + ROUNDING))
    return beta * torch.where(over, 2 / product, torch.ones_like(product))


class _RoundedUnit(torch.autograd.Function):
    """x, of 16 bits -> (y = x / |x| rounded to x's dtype, |x / |x||^2 / |y|^2): saves no float32 copy.

    Not for float32: under torch.compile, torch 2.11 drops the gradient of a Function whose output went through a cast
    that changes nothing.
    """

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        square = x.float().square().sum(-1, keepdim=True)
        rstd = torch.rsqrt(square + L2NORM_EPS)
        y = (x.float() * rstd).to(x.dtype)
        rounded = y.float().square().sum(-1)
        exact = (square * rstd.square()).squeeze(-1)
        return y, torch.where(rounded > 0, exact / rounded, 1.0), rstd

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], output[2])
        ctx.mark_non_differentiable(output[1], output[2])

    @staticmethod
    def backward(ctx, dy: Tensor, _dratio, _drstd) -> Tensor:
        x, rstd = ctx.saved_tensors
        dy, y = dy.float(), x.float() * rstd
        return ((dy - y * (y * dy).sum(-1, keepdim=True)) * rstd).to(x.dtype)


def normalise(q: Tensor, k: Tensor, beta: Tensor, use_qk_l2norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q and k normalised in float32 and rounded, beta [B, T*n, H] float32, scaled to the rounded lengths.

    The kernels multiply 16-bit keys, whose |k|^2 is off by up to 0.4 %: at beta = 2 the transition would
    expand. With beta' = beta |k exact|^2 / |k rounded|^2 it is again I - beta u u^T for a unit u. The ratio
    is a constant for autograd: it differs from 1 by rounding only, whose derivative is noise. In float32 there is
    nothing to scale. Plain PyTorch, outside the op, so that Inductor fuses it.
    """
    if not use_qk_l2norm:
        return q, k, contractive_beta(k, beta)
    if q.dtype == compute_dtype(q):
        return l2norm(q), l2norm(k), beta.to(q.dtype)
    q, _, _ = _RoundedUnit.apply(q)
    k, ratio, _ = _RoundedUnit.apply(k)
    return q, k, beta.float() * ratio

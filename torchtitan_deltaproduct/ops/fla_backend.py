"""flash-linear-attention's Triton kernels as a backend; the only module that imports fla, and only to run it.

fla's autograd function is driven by hand, forward and backward, because it runs inside a custom op, below
autograd. What its forward saves and we cannot rebuild (the solved triangles, the summed gates) are outputs of
our op.

    o, state, solved, gates = forward(q, k, v, g, beta, None, None, 2, 0.125, False)
"""

import importlib.util
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

from torchtitan_deltaproduct.ops.normalize import L2NORM_EPS, contractive_beta, full_precision

MAX_HEAD_DIM = 256
CHUNK = 64
LOW_PRECISION = ("bfloat16", "float16")


def obstacle(device_type: str, dtypes: tuple[str, ...], gated: bool, head_dim: int) -> str | None:
    """Why fla cannot run this, in one line; None if it can."""
    if device_type != "cuda":
        return f"its kernels need CUDA, the tensors are on {device_type}"
    if len(set(dtypes)) > 1 or dtypes[0] not in LOW_PRECISION:
        return f"q, k and v must share bfloat16 or float16, found {', '.join(dtypes)}"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim is {head_dim}, its kernels take at most {MAX_HEAD_DIM}"
    return _missing() or (_broken_gated_backward() if gated else None)


@lru_cache(maxsize=1)
def _missing() -> str | None:
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed (pip install 'flash-linear-attention>=0.6,<0.7')"
    try:
        _function()
    except Exception as error:  # an installed fla can fail in many ways: Triton, transformers, a driver
        return f"flash-linear-attention does not import ({type(error).__name__}: {error})"
    return None


@lru_cache(maxsize=1)
def _broken_gated_backward() -> str | None:
    import triton

    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3] if part.isdigit())
    if torch.cuda.get_device_capability()[0] == 9 and (3, 4, 0) <= version < (3, 7, 1):
        return f"its gated backward fails on Hopper with Triton {triton.__version__} (fla #640, needs 3.7.1)"
    return None


def _function() -> type[torch.autograd.Function]:
    from fla.ops.gated_delta_product.chunk import ChunkGatedDeltaProductFunction

    return ChunkGatedDeltaProductFunction


class _RoundedUnit(torch.autograd.Function):
    """x -> (y = x / |x| rounded to x's dtype, |x / |x||^2 / |y|^2): saves no float32 copy."""

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
    is a constant for autograd: it differs from 1 by rounding only, whose derivative is noise. Plain PyTorch,
    outside the op, so that Inductor fuses it.
    """
    if not use_qk_l2norm:
        return q, k, contractive_beta(k, beta)
    q, _, _ = _RoundedUnit.apply(q)
    k, ratio, _ = _RoundedUnit.apply(k)
    return q, k, beta.float() * ratio


def saved_shapes(k: Tensor, g: Tensor | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `solved` (in k's dtype) and of `gates` (float32)."""
    return (*k.shape[:3], CHUNK), (0,) if g is None else tuple(k.shape[:3])


def _documents(
    cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(boundaries without empty documents on the device, the same on the CPU, index of the documents kept or
    None)."""
    if cu_seqlens is None:
        return None, None, None
    bounds = cu_seqlens.to("cpu", torch.int64)
    kept = (bounds.diff() > 0).nonzero().squeeze(-1)
    if kept.numel() == bounds.numel() - 1:
        return bounds.to(device, non_blocking=True), bounds, None
    bounds = torch.cat([bounds[:1], bounds[1:][kept]])
    return bounds.to(device, non_blocking=True), bounds, kept.to(device, non_blocking=True)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    num_householder: int,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """o, the final state [N, H, K, V] float32 or None, the solved triangles, the gates summed by chunk or
    None."""
    device_bounds, cpu_bounds, kept = _documents(cu_seqlens, q.device)
    states = None if initial_state is None else initial_state.float()
    initial = states if states is None or kept is None else states[kept]
    ctx = _Context()
    gate = None if g is None else g.float()
    with torch.cuda.device(q.device), full_precision("cuda"):
        o, final = _function().forward(
            ctx,
            q,
            k,
            v,
            gate,
            beta.float(),
            scale,
            num_householder,
            initial,
            output_final_state,
            False,
            device_bounds,
            cpu_bounds,
            None,
        )
    saved = ctx.saved_tensors
    if final is not None and kept is not None:
        every = (
            final.new_zeros(cu_seqlens.shape[0] - 1, *final.shape[1:]) if states is None else states.clone()
        )
        every[kept] = final
        final = every
    return o.to(v.dtype), final, saved[_SOLVED], saved[_GATES]


def backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    solved: Tensor,
    gates: Tensor,
    num_householder: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of q, k, v, g, beta and the initial state."""
    from fla.ops.utils.index import prepare_chunk_indices

    device_bounds, cpu_bounds, kept = _documents(cu_seqlens, q.device)
    initial = None if initial_state is None else initial_state.float()
    if kept is not None:
        initial = None if initial is None else initial[kept]
        dkept = None if dstate is None else dstate[kept]
    else:
        dkept = dstate
    indices = None
    if device_bounds is not None:
        rows, cpu_rows = device_bounds * num_householder, cpu_bounds * num_householder
        indices = prepare_chunk_indices(rows, CHUNK, cu_seqlens_cpu=cpu_rows)
    ctx = _Context()
    ctx.save_for_backward(
        q,
        None,
        k,
        None,
        v,
        None if g is None else gates,
        beta.float(),
        solved,
        initial,
        device_bounds,
        indices,
    )
    ctx.scale, ctx.num_householder, ctx.use_qk_l2norm_in_kernel, ctx.cp_context = (
        scale,
        num_householder,
        False,
        None,
    )
    with torch.cuda.device(q.device), full_precision("cuda"):
        grads = _function().backward(ctx, do.contiguous(), dkept)
    dq, dk, dv, dg, dbeta, dinitial = *grads[:5], grads[7]
    if kept is not None and dinitial is not None:
        # An empty document hands its initial state on: so it does with the gradient.
        every = torch.zeros_like(initial_state, dtype=torch.float32) if dstate is None else dstate.clone()
        every[kept] = dinitial
        dinitial = every
    return dq, dk, dv, None if g is None else dg.to(g.dtype), dbeta.to(beta.dtype), dinitial


class _Context(SimpleNamespace):
    """Stands in for autograd's context, for `torch.amp.custom_bwd` too: the op never runs under autocast."""

    saved_tensors: tuple[Tensor | None, ...] = ()
    _fwd_used_autocast = False
    _dtype = None

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


_GATES, _SOLVED = 5, 7
"""Where fla's forward saves them; `tests/gpu/test_op.py` would fail if a release moved them."""

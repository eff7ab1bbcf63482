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

from torchtitan_deltaproduct.ops.normalize import full_precision

MAX_HEAD_DIM = 256
CHUNK = 64
LOW_PRECISION = ("bfloat16", "float16")


def obstacle(
    device_type: str, dtypes: tuple[str, ...], gated: bool, head_dim: int, packed_states: bool = False
) -> str | None:
    """Why fla cannot run this, in one line; None if it can."""
    if packed_states:
        return "it takes no initial or final state of rows that hold several documents"
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


def saved_shapes(k: Tensor, g: Tensor | None, packed: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `solved` (in k's dtype) and of `gates` (float32)."""
    rows = (1, k.shape[0] * k.shape[1], k.shape[2]) if packed else tuple(k.shape[:3])
    return (*rows, CHUNK), (0,) if g is None else rows


def _boundaries(positions: Tensor | None) -> Tensor | None:
    """[N+1] int64 boundaries of the documents of all rows, one after another. Waits for the device."""
    if positions is None:
        return None
    starts = positions == 0
    starts[:, 0] = True
    bounds = starts.flatten().nonzero().squeeze(1)
    return torch.cat([bounds, bounds.new_tensor([positions.numel()])])


def _in_one_row(positions: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """fla takes packed documents as one row."""
    if positions is None:
        return tensors
    return tuple(None if x is None else x.flatten(0, 1).unsqueeze(0) for x in tensors)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    positions: Tensor | None,
    num_householder: int,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """o, the final state [B, H, K, V] float32 or None, the solved triangles, the gates summed by chunk or None.

    `positions` and states do not go together: `obstacle` names it.
    """
    shape, bounds = (*q.shape[:3], v.shape[3]), _boundaries(positions)
    q, k, v, g, beta = _in_one_row(positions, q, k, v, g, beta)
    ctx = _Context()
    with torch.cuda.device(q.device), full_precision("cuda"):
        o, final = _function().forward(
            ctx,
            q,
            k,
            v,
            None if g is None else g.float(),
            beta.float(),
            scale,
            num_householder,
            None if initial_state is None else initial_state.float(),
            output_final_state,
            False,
            bounds,
            None if bounds is None else bounds.cpu(),
            None,
        )
    solved, gates = _solved_and_gates(ctx.saved_tensors, *saved_shapes(k, g, False))
    return o.to(v.dtype).view(shape), final, solved, gates


def backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    positions: Tensor | None,
    solved: Tensor,
    gates: Tensor,
    num_householder: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of q, k, v, g, beta and the initial state."""
    from fla.ops.utils.index import prepare_chunk_indices

    like = (q, k, v, g, beta)
    bounds, indices = _boundaries(positions), None
    do, q, k, v, beta = _in_one_row(positions, do.contiguous(), q, k, v, beta)
    if bounds is not None:
        rows = bounds * num_householder
        indices = prepare_chunk_indices(rows, CHUNK, cu_seqlens_cpu=rows.cpu())
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
        None if initial_state is None else initial_state.float(),
        bounds,
        indices,
    )
    ctx.scale, ctx.num_householder, ctx.use_qk_l2norm_in_kernel, ctx.cp_context = (
        scale,
        num_householder,
        False,
        None,
    )
    with torch.cuda.device(q.device), full_precision("cuda"):
        grads = _function().backward(ctx, do, dstate)
    dq, dk, dv, dg, dbeta = (
        None if x is None else grad.view(x.shape).to(x.dtype) for x, grad in zip(like, grads[:5], strict=True)
    )
    return dq, dk, dv, dg, dbeta, grads[7]


class _Context(SimpleNamespace):
    """Stands in for autograd's context, for `torch.amp.custom_bwd` too: the op never runs under autocast."""

    saved_tensors: tuple[Tensor | None, ...] = ()
    _fwd_used_autocast = False
    _dtype = None

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


WRITTEN_FOR = "0.6"
"""Version of flash-linear-attention whose forward saves the gates and the solved triangles at these places."""
_GATES, _SOLVED, _SAVED = 5, 7, 11


def _solved_and_gates(
    saved: tuple[Tensor | None, ...], solved: tuple[int, ...], gates: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """The two tensors of what fla saved, after a look at whether they are these.

    Raises:
        RuntimeError: another number of tensors, or other shapes, than WRITTEN_FOR has.
    """
    shapes = [(0,) if x is None else tuple(x.shape) for x in saved]
    if len(shapes) != _SAVED or shapes[_SOLVED] != solved or shapes[_GATES] != gates:
        raise RuntimeError(
            f"flash-linear-attention saves tensors of shapes {shapes}\n"
            f"expected {_SAVED}, with {solved} at place {_SOLVED} and {gates} at {_GATES}\n"
            f"ops/fla_backend.py was written for {WRITTEN_FOR}: install that, or set model.op_backend to another"
        )
    return saved[_SOLVED], saved[_GATES]

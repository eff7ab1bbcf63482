"""The operator as `torch.library` custom ops, forward and backward, opaque to torch.compile.

Dynamo and AOTAutograd see two nodes with known output shapes, never the kernels inside: a block compiles with
`fullgraph=True`, selective activation checkpointing can name the op, and `FlopCounterMode` counts the
recurrence.

    torch.ops.deltaproduct.gated_delta_product(q, k, v, g, beta, None, None, 2, 0.125, False, True, True, "chunk")

A custom op cannot return None: tensors that do not apply (the final state, gradients of absent inputs) have
no elements. Inductor caches compiled graphs by the op's name and signature, not by its shapes: a change of the
outputs needs a change of either, or graphs cached by an older version fail ("mismatch in length of strides").
"""

import torch
from torch import Tensor

from torchtitan_deltaproduct.ops import chunk, fla_backend, triton_backend
from torchtitan_deltaproduct.ops.normalize import compute_dtype


@torch.library.custom_op("deltaproduct::gated_delta_product", mutates_args=())
def _forward(
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
    use_qk_l2norm: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments as in `gated_delta_product`, `backend` already resolved to "chunk", "fla" or "triton".

    Returns:
        o, the final state, and with `save` up to three tensors for the backward: the records, factors and maps of our
        kernels; fla's solved triangles and gates; chunk's segment starts and errors.
    """
    saved: tuple[Tensor | None, ...]
    if backend == "triton":
        o, state, *saved = triton_backend.forward(
            *(q, k, v, g, beta, initial_state, positions),
            n=num_householder,
            scale=scale,
            final=output_final_state,
            save=save,
        )
    elif backend == "fla":
        o, state, *saved = fla_backend.forward(
            q, k, v, g, beta, initial_state, positions, num_householder, scale, output_final_state
        )
    else:
        options = {"scale": scale, "use_qk_l2norm": use_qk_l2norm}
        o, state, *saved = chunk.chunk_forward(q, k, v, g, beta, initial_state, positions, **options)
    kept = [no_tensor(q) if x is None or not save else x for x in saved]
    kept += [no_tensor(q) for _ in range(3 - len(kept))]
    return o, state if output_final_state else no_tensor(q), *kept


def no_tensor(like: Tensor) -> Tensor:
    """What stands for a tensor that does not apply."""
    return like.new_empty(0, dtype=torch.float32)


@_forward.register_fake
def _(
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
    use_qk_l2norm: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    o = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3], dtype=v.dtype)
    state = no_tensor(q)
    if output_final_state:
        state = q.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=compute_dtype(q, k, v))
    packed = positions is not None
    if not save:
        return o, state, *(no_tensor(q) for _ in range(3))
    if backend == "triton":
        shapes = triton_backend.saved_shapes(q, k, v, g is not None, packed)
        dtypes = (k.dtype, torch.float32, torch.float32)
    elif backend == "fla":
        shapes, dtypes = (*fla_backend.saved_shapes(k, g, packed), (0,)), (k.dtype, torch.float32, torch.float32)
    else:
        shapes, dtypes = (*chunk.saved_shapes(q, k, v), (0,)), (*(compute_dtype(q, k, v),) * 2, torch.float32)
    return o, state, *(q.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


@torch.library.custom_op("deltaproduct::gated_delta_product_backward", mutates_args=())
def _backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    positions: Tensor | None,
    first: Tensor,
    second: Tensor,
    third: Tensor,
    num_householder: int,
    scale: float,
    use_qk_l2norm: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state, each in the dtype of its tensor.

    `first`, `second` and `third` are what the forward returned for the backward. v is None with backend "triton", whose
    backward does not read it.
    """
    if backend == "triton":
        *most, dg, dbeta, dinitial = triton_backend.backward(
            *(do, dstate, q, k, g, beta, positions, first, second, third),
            n=num_householder,
            scale=scale,
            initial=initial_state is not None,
        )
    elif backend == "fla":
        *most, dg, dbeta, dinitial = fla_backend.backward(
            do, dstate, q, k, v, g, beta, initial_state, positions, first, second, num_householder, scale
        )
    else:
        *most, dg, dbeta, dinitial = chunk.chunk_backward(
            *(do, dstate, q, k, v, g, beta, positions, first, second), scale=scale, use_qk_l2norm=use_qk_l2norm
        )
    dg = no_tensor(q) if g is None else dg.to(g.dtype)
    dinitial = no_tensor(q) if initial_state is None else dinitial.to(initial_state.dtype)
    return *most, dg, dbeta.to(beta.dtype), dinitial


@_backward.register_fake
def _(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    positions: Tensor | None,
    first: Tensor,
    second: Tensor,
    third: Tensor,
    num_householder: int,
    scale: float,
    use_qk_l2norm: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor | None) -> Tensor:
        return no_tensor(q) if x is None else x.new_empty(x.shape)

    dv = do.new_empty(*k.shape[:3], do.shape[3])
    return like(q), like(k), dv, like(g), like(beta), like(initial_state)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, *others = inputs[:7]
    ctx.options = (*inputs[7:9], inputs[10], inputs[12])
    ctx.save_for_backward(q, k, None if inputs[12] == "triton" else v, *others, *output[2:])
    ctx.has_state = inputs[9]
    ctx.output_shape, ctx.output_dtype = output[0].shape, output[0].dtype
    ctx.set_materialize_grads(False)


def _autograd(ctx, do, dstate, *_dsaved):
    # Read once: under activation checkpointing a second look is an error.
    saved = ctx.saved_tensors
    q, _, _, g, _, initial_state, _ = saved[:7]
    if do is None:
        do = torch.zeros(ctx.output_shape, dtype=ctx.output_dtype, device=q.device)
    dq, dk, dv, dg, dbeta, dinitial = BACKWARD(do, dstate if ctx.has_state else None, *saved, *ctx.options)
    dg = None if g is None else dg
    dinitial = None if initial_state is None else dinitial
    return dq, dk, dv, dg, dbeta, dinitial, None, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)

FORWARD = torch.ops.deltaproduct.gated_delta_product.default
BACKWARD = torch.ops.deltaproduct.gated_delta_product_backward.default

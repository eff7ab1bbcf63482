"""The operator as `torch.library` custom ops, forward and backward, opaque to torch.compile.

Dynamo and AOTAutograd see two nodes with known output shapes, never the kernels inside: a block compiles with
`fullgraph=True`, selective activation checkpointing can name the op, and `FlopCounterMode` counts the
recurrence.

    o, state, *saved = torch.ops.deltaproduct.gated_delta_product(
        q, k, v, g, beta, None, None, 2, 0.125, False, True, "all", "chunk"
    )

A custom op cannot return None: tensors that do not apply (the final state, gradients of absent inputs) have
no elements. Inductor caches compiled graphs by the op's name and signature, not by its shapes: a change of the
outputs needs a change of either, or graphs cached by an older version fail ("mismatch in length of strides").
"""

import torch
from torch import Tensor

from torchtitan_deltaproduct.ops import chunk, fla_backend, triton_backend
from torchtitan_deltaproduct.ops.library import fake, gradient, no_gradient, operator
from torchtitan_deltaproduct.ops.normalize import compute_dtype


@operator("gated_delta_product")
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
    keep: str,
    backend: str,
) -> list[Tensor]:
    """Arguments as in `gated_delta_product`, `backend` already resolved to "chunk", "fla" or "triton".

    `keep` is what to return for the backward pass: "nothing", "all", or "chunks", which leaves out the states before
    the chunks: our kernels make them again, from v; the other backends take it for "all".

    Returns:
        o, the final state, and unless `keep` is "nothing" what the backward needs: of triton, see its `saved_shapes`;
        fla's solved triangles and gates; chunk's segment starts and errors.
    """
    operands = q, k, v, g, beta, initial_state, positions
    if backend == "triton":
        options = {"final": output_final_state, "save": keep != "nothing", "keep_states": keep == "all"}
        o, state, saved = triton_backend.forward(*operands, scale=scale, **options)
    elif backend == "fla":
        o, state, *saved = fla_backend.forward(*operands, num_householder, scale, output_final_state)
    else:
        o, state, *saved = chunk.chunk_forward(*operands, scale=scale, use_qk_l2norm=use_qk_l2norm)
    kept = [] if keep == "nothing" else [no_tensor(q) if x is None else x for x in saved]
    return [o, state if output_final_state else no_tensor(q), *kept]


def no_tensor(like: Tensor) -> Tensor:
    """What stands for a tensor that does not apply."""
    return like.new_empty(0, dtype=torch.float32)


@fake(_forward)
def _(q, k, v, g, beta, initial_state, positions, n, scale, output_final_state, l2norm, keep, backend):
    o = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3], dtype=v.dtype)
    state = no_tensor(q)
    if output_final_state:
        state = q.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=compute_dtype(q, k, v))
    gated, packed = g is not None, positions is not None
    if keep == "nothing":
        saved = []
    elif backend == "triton":
        saved = triton_backend.saved_shapes(q, k, v.shape[3], gated, packed, keep == "all")
    elif backend == "fla":
        saved = zip(fla_backend.saved_shapes(k, g, packed), (k.dtype, torch.float32), strict=True)
    else:
        saved = ((shape, compute_dtype(q, k, v)) for shape in chunk.saved_shapes(q, k, v))
    return [o, state, *(q.new_empty(shape, dtype=dtype) for shape, dtype in saved)]


@operator("gated_delta_product_backward")
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
    saved: list[Tensor],
    num_householder: int,
    scale: float,
    use_qk_l2norm: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state, each in the dtype of its tensor.

    `saved` is what the forward returned for the backward; v is None where the backward does not read it.
    """
    operands = do, dstate, q, k, v, g, beta, initial_state, positions
    if backend == "triton":
        *most, dg, dbeta, dinitial = triton_backend.backward(*operands, saved, scale=scale)
    elif backend == "fla":
        *most, dg, dbeta, dinitial = fla_backend.backward(*operands, *saved, num_householder, scale)
    else:
        *most, dg, dbeta, dinitial = chunk.chunk_backward(
            *(do, dstate, q, k, v, g, beta, positions, *saved), scale=scale, use_qk_l2norm=use_qk_l2norm
        )
    dg = no_tensor(q) if g is None else dg.to(g.dtype)
    dinitial = no_tensor(q) if initial_state is None else dinitial.to(initial_state.dtype)
    return *most, dg, dbeta.to(beta.dtype), dinitial


@fake(_backward)
def _(do, dstate, q, k, v, g, beta, initial_state, *_rest):
    def like(x: Tensor | None) -> Tensor:
        return no_tensor(q) if x is None else x.new_empty(x.shape)

    dv = do.new_empty(*k.shape[:3], do.shape[3])
    return like(q), like(k), dv, like(g), like(beta), like(initial_state)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, *others = inputs[:7]
    n, scale, ctx.has_state, use_qk_l2norm, keep, backend = inputs[7:]
    ctx.options = n, scale, use_qk_l2norm, backend
    v_is_read = backend != "triton" or keep != "all"
    ctx.save_for_backward(q, k, v if v_is_read else None, *others, *output[2:])
    ctx.output_shape, ctx.output_dtype = output[0].shape, output[0].dtype
    ctx.set_materialize_grads(False)


def _autograd(ctx, grads: list[Tensor | None]):
    # Read once: under activation checkpointing a second look is an error.
    tensors = ctx.saved_tensors
    operands, saved, (do, dstate) = tensors[:7], tensors[7:], grads[:2]
    q, _, _, g, _, initial_state, _ = operands
    if do is None:
        do = torch.zeros(ctx.output_shape, dtype=ctx.output_dtype, device=q.device)
    grads = BACKWARD(do, dstate if ctx.has_state else None, *operands, list(saved), *ctx.options)
    dq, dk, dv, dg, dbeta, dinitial = grads
    dg = None if g is None else dg
    dinitial = None if initial_state is None else dinitial
    return dq, dk, dv, dg, dbeta, dinitial, *(None,) * 7


gradient(_forward, _autograd, _setup_context)
no_gradient(_backward)

FORWARD = _forward
BACKWARD = _backward

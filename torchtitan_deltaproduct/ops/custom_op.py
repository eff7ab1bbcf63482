"""The operator as `torch.library` custom ops, forward and backward, opaque to torch.compile.

Dynamo and AOTAutograd see two nodes with known output shapes, never the kernels inside: a block compiles with
`fullgraph=True`, selective activation checkpointing can name the op, and `FlopCounterMode` counts the
recurrence.

    torch.ops.deltaproduct.gated_delta_product(q, k, v, g, beta, None, None, 2, 0.125, False, True, "chunk")

A custom op cannot return None: tensors that do not apply (the final state, gradients of absent inputs) have
no elements. Inductor caches compiled graphs by the op's name and signature, not by its shapes: a change of the
outputs needs a change of either, or graphs cached by an older version fail ("mismatch in length of strides").
"""

import torch
from torch import Tensor

from torchtitan_deltaproduct.ops import chunk, documents, fla_backend
from torchtitan_deltaproduct.ops.normalize import compute_dtype


@torch.library.custom_op("deltaproduct::gated_delta_product", mutates_args=())
def _forward(
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
    use_qk_l2norm: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments as in `gated_delta_product`, `backend` already resolved to "chunk" or "fla".

    Returns:
        o, the final state, and two tensors for the backward: fla's solved triangles and gates; chunk's
        segment starts and errors (v's number of elements, in the compute dtype).
    """
    none = q.new_empty(0, dtype=torch.float32)
    if cu_seqlens is not None:
        documents.check_boundaries(cu_seqlens, q.shape[1])
    if backend == "fla":
        o, state, *saved = fla_backend.forward(
            q, k, v, g, beta, initial_state, cu_seqlens, num_householder, scale, output_final_state
        )
        return o, none if state is None else state, *(none.clone() if x is None else x for x in saved)
    options = {"scale": scale, "use_qk_l2norm": use_qk_l2norm}
    if cu_seqlens is not None and (initial_state is not None or output_final_state):
        o, state = documents.forward(q, k, v, g, beta, initial_state, cu_seqlens, **options)
        saved = none, none.clone()
    else:
        o, state, *saved = chunk.chunk_forward(q, k, v, g, beta, initial_state, cu_seqlens, **options)
    return o, state if output_final_state else none.clone(), *saved


@_forward.register_fake
def _(
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
    use_qk_l2norm: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (count, q.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
    by_document = cu_seqlens is not None and (initial_state is not None or output_final_state)
    if backend == "fla":
        shapes, dtypes = fla_backend.saved_shapes(k, g), (k.dtype, torch.float32)
    elif by_document:
        shapes, dtypes = ((0,), (0,)), (torch.float32, torch.float32)
    else:
        shapes, dtypes = chunk.saved_shapes(q, k, v), (compute_dtype(q, k, v),) * 2
    return (
        q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3], dtype=v.dtype),
        q.new_empty(state_shape, dtype=compute_dtype(q, k, v) if output_final_state else torch.float32),
        *(q.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)),
    )


@torch.library.custom_op("deltaproduct::gated_delta_product_backward", mutates_args=())
def _backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    first: Tensor,
    second: Tensor,
    num_householder: int,
    scale: float,
    use_qk_l2norm: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state, each in the dtype of its tensor.

    `first` and `second` are what the forward returned for the backward.
    """
    if backend == "fla":
        grads = fla_backend.backward(
            do, dstate, q, k, v, g, beta, initial_state, cu_seqlens, first, second, num_householder, scale
        )
    else:
        options = {"scale": scale, "use_qk_l2norm": use_qk_l2norm}
        if cu_seqlens is not None and first.numel() == 0:
            grads = documents.backward(do, dstate, q, k, v, g, beta, initial_state, cu_seqlens, **options)
        else:
            grads = chunk.chunk_backward(do, dstate, q, k, v, g, beta, cu_seqlens, first, second, **options)
    *most, dg, dbeta, dinitial = grads
    none = q.new_empty(0, dtype=torch.float32)
    dg = none if g is None else dg
    dinitial = none.clone() if initial_state is None else dinitial.to(initial_state.dtype)
    return *most, dg, dbeta, dinitial


@_backward.register_fake
def _(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    first: Tensor,
    second: Tensor,
    num_householder: int,
    scale: float,
    use_qk_l2norm: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape)

    return like(q), like(k), like(v), like(g), like(beta), like(initial_state)


def _setup_context(ctx, inputs, output) -> None:
    tensors, ctx.options = inputs[:7], (*inputs[7:9], *inputs[10:])
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.has_state = inputs[9]
    ctx.set_materialize_grads(False)


def _autograd(ctx, do, dstate, _dfirst, _dsecond):
    # Read once: under activation checkpointing a second look is an error.
    saved = ctx.saved_tensors
    q, _, v, g, _, initial_state, _ = saved[:7]
    if do is None:
        do = v.new_zeros(*q.shape[:3], v.shape[3])
    dq, dk, dv, dg, dbeta, dinitial = BACKWARD(do, dstate if ctx.has_state else None, *saved, *ctx.options)
    dg = None if g is None else dg
    dinitial = None if initial_state is None else dinitial
    return dq, dk, dv, dg, dbeta, dinitial, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)

FORWARD = torch.ops.deltaproduct.gated_delta_product.default
BACKWARD = torch.ops.deltaproduct.gated_delta_product_backward.default

SAVE_FOR_SELECTIVE_AC = {FORWARD}
"""Ops whose outputs selective activation checkpointing should keep. With backend "chunk" that is o and, for
the backward, the errors: as many elements as v, in float32 (4 * B * T * n * H * V bytes a layer)."""

"""The operator over a sequence that is cut among ranks: context parallelism.

To the tokens before it a shard is an affine map of the state, S -> P S + Z with P [K, K] and Z [K, V] per head: how
long it is does not matter to the ranks behind it. Each rank makes its map, all gather all maps, and each chains those
before it into the state that enters its own shard. Gradients return the same way. Let R be the gradient that a shard's
own outputs send to the state that enters it; then the gradient of the state that leaves shard r is

    L_{W-1} = 0        L_{r-1} = P_r^T L_r + R_r

so that a second gather, of R, gives each rank L, and one backward pass of the shard from it gives all gradients: P and
Z need none of their own. A document that begins at token t > 0 of the shard makes P = 0 in the kernels; at t = 0, here.

    o = run(q, k, v, g, beta, positions, ranks, n=2, scale=K**-0.5, use_qk_l2norm=True, keep="all", backend="chunk")

Sent by each rank, in float32: B H K (V + K) numbers forward, B H K V backward; received: W times that. The chain is r
products of K x K by K x V a head. Backend "chunk" carries P beside Z and what its queries would read of P: the state
that enters is added afterwards, and no pass runs twice. It keeps (n + 1) (V + K) float32 numbers a token and head.
"""

import torch
from torch import Tensor

from torchtitan_deltaproduct.ops import chunk, triton_backend, triton_shards
from torchtitan_deltaproduct.ops.custom_op import no_tensor
from torchtitan_deltaproduct.ops.library import fake, no_gradient, operator
from torchtitan_deltaproduct.ops.normalize import compute_dtype, full_precision
from torchtitan_deltaproduct.ops.ranks import SequenceRanks, gather


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    positions: Tensor | None,
    ranks: SequenceRanks,
    *,
    n: int,
    scale: float,
    use_qk_l2norm: bool,
    keep: str,
    backend: str,
) -> Tensor:
    """o [B, T, H, V] of this rank's shard, differentiable in q, k, v, g and beta on all ranks.

    Args:
        q, k, v, g, beta, scale, use_qk_l2norm: of the shard, as in `gated_delta_product`.
        positions: [B, T] int32, index of each token in its document, counted from the document's start on whichever
            rank that is; None: a row is one document over all ranks.
        ranks: who has the other shards; all of them must call this.
        n: micro-steps a token.
        keep: for the backward pass: see `custom_op`.
        backend: "chunk" or "triton".
    """
    place = ranks.rank, ranks.size, ranks.group
    return _Shard.apply(q, k, v, g, beta, positions, *place, n, scale, use_qk_l2norm, keep, backend)


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, positions, rank, size, group, n, scale, use_qk_l2norm, keep, backend):
        options = n, scale, use_qk_l2norm, backend
        shard, *made = MAP(q, k, v, g, beta, positions, *options, keep != "nothing")
        maps = gather(shard, size, group)
        entering = unless_new(ENTERING(maps, rank), positions)
        o, states = OUTPUT(q, k, v, g, beta, positions, entering, *made, *options, keep == "all")
        # Our kernels' backward does not read v if it has the states.
        v = None if backend == "triton" and keep == "all" else v
        ctx.save_for_backward(q, k, v, g, beta, positions, entering, maps, *made, states)
        ctx.place, ctx.options = (rank, size, group), options
        return o

    @staticmethod
    def backward(ctx, do):
        # Read once: under activation checkpointing a second look is an error.
        q, k, v, g, beta, positions, entering, maps, *saved = ctx.saved_tensors
        (rank, size, group), options, (*made, states) = ctx.place, ctx.options, saved
        response, shares = RESPONSE(do, q, k, v, g, beta, positions, *made, *options)
        leaving = LEAVING(maps, gather(unless_new(response, positions), size, group), rank)
        operands = q, k, v, g, beta, positions, entering
        dq, dk, dv, dg, dbeta = BACKWARD(do, leaving, *operands, *made, states, shares, *options)
        return dq, dk, dv, None if g is None else dg, dbeta, *(None,) * 9


def unless_new(x: Tensor, positions: Tensor | None) -> Tensor:
    """x [B, ...], zero where a document begins with the shard's first token."""
    return x if positions is None else torch.where(positions[:, :1, None, None] == 0, 0, x)


@operator("shard_map")
def _map(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    positions: Tensor | None,
    num_householder: int,
    scale: float,
    use_qk_l2norm: bool,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shard's map [Z | P], [B, H, K, V + K], and three tensors for what follows.

    Those of triton: prepared, factors and maps of `triton_shards.affine_map`. Those of chunk: what the queries read of
    [Z | P], [B, T, H, V + K], and, with `save`, starts and errors of `chunk_forward`.
    """
    if backend == "triton":
        shard, *made = triton_shards.affine_map(q, k, v, g, beta, positions)
    else:
        (batch, _, heads, dim), dim_v = q.shape, v.shape[3]
        eye = torch.eye(dim, dim_v + dim, dtype=compute_dtype(q, k, v), device=q.device).roll(dim_v, 1)
        reads, shard, *rest = chunk.chunk_forward(
            *(q, k, v, g, beta, eye.expand(batch, heads, -1, -1), positions),
            scale=scale,
            use_qk_l2norm=use_qk_l2norm,
        )
        made = (reads, *(rest if save else (None, None)))
    if positions is not None:
        shard[..., v.shape[3] :] *= (positions[:, :1, None, None] != 0).to(shard.dtype)
    return shard, *(no_tensor(q) if x is None else x for x in made)


@fake(_map)
def _(q, k, v, g, beta, positions, num_householder, scale, use_qk_l2norm, backend, save):
    (batch, length, heads, dim), columns, dtype = q.shape, v.shape[3] + q.shape[3], compute_dtype(q, k, v)
    shard = q.new_empty(batch, heads, dim, columns, dtype=dtype)
    if backend == "triton":
        prepared, *others = triton_shards.made_shapes(q, k, v.shape[3], g is not None, positions is not None)
        return shard, k.new_empty(prepared), *(q.new_empty(shape, dtype=torch.float32) for shape in others)
    reads = q.new_empty(batch, length, heads, columns, dtype=dtype)
    if not save:
        return shard, reads, no_tensor(q), no_tensor(q)
    starts, errors = ((*shape[:-1], columns) for shape in chunk.saved_shapes(q, k, v))
    return shard, reads, q.new_empty(starts, dtype=dtype), q.new_empty(errors, dtype=dtype)


@operator("entering_state")
def _entering(maps: Tensor, rank: int) -> Tensor:
    """maps: [W, B, H, K, V + K] -> the state that enters shard `rank`, [B, H, K, V]."""
    dim_v = maps.shape[4] - maps.shape[3]
    state = maps.new_zeros(*maps.shape[1:4], dim_v)
    with full_precision(maps.device.type):
        for shard in maps[:rank]:
            state = torch.matmul(shard[..., dim_v:], state) + shard[..., :dim_v]
    return state


@fake(_entering)
def _(maps, rank):
    return maps.new_empty(*maps.shape[1:4], maps.shape[4] - maps.shape[3])


@operator("leaving_gradient")
def _leaving(maps: Tensor, responses: Tensor, rank: int) -> Tensor:
    """The gradient of the state that leaves shard `rank`, [B, H, K, V], from all R [W, B, H, K, V]."""
    gradient = torch.zeros_like(responses[0])
    with full_precision(maps.device.type):
        for later in reversed(range(rank + 1, maps.shape[0])):
            gradient = torch.matmul(maps[later, ..., responses.shape[4] :].mT, gradient) + responses[later]
    return gradient


@fake(_leaving)
def _(maps, responses, rank):
    return responses.new_empty(responses.shape[1:])


@operator("shard_output")
def _output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    positions: Tensor | None,
    entering: Tensor,
    first: Tensor,
    second: Tensor,
    third: Tensor,
    num_householder: int,
    scale: float,
    use_qk_l2norm: bool,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """o from the state that enters and what `shard_map` made; of triton with `save` also the states of the chunks."""
    if backend == "triton":
        given = entering, g is not None, positions is not None, first, second, third
        o, states = triton_shards.output(q, k, v, *given, scale=scale, save=save)
        return o, states if save else no_tensor(q)
    dim_v = v.shape[3]
    with full_precision(q.device.type):
        o = torch.matmul(first[..., dim_v:].transpose(1, 2), entering).transpose(1, 2).add_(first[..., :dim_v])
    return o.to(v.dtype).contiguous(), no_tensor(q)


@fake(_output)
def _(q, k, v, g, beta, positions, entering, first, second, third, num_householder, scale, l2norm, backend, save):
    o = q.new_empty(*q.shape[:3], v.shape[3], dtype=v.dtype)
    if backend != "triton" or not save:
        return o, no_tensor(q)
    *_, (states, _) = triton_backend.saved_shapes(q, k, v.shape[3], g is not None, positions is not None, True)
    return o, k.new_empty(states)


@operator("shard_response")
def _response(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    g: Tensor | None,
    beta: Tensor,
    positions: Tensor | None,
    first: Tensor,
    second: Tensor,
    third: Tensor,
    num_householder: int,
    scale: float,
    use_qk_l2norm: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """R [B, H, K, V], what the shard's own outputs send back to the state that enters it; of triton, its shares.

    v is not read with backend "triton".
    """
    if backend == "triton":
        given = g is not None, positions is not None, first, second, third
        return triton_shards.response(do, q, k, *given, scale=scale)
    with full_precision(q.device.type):
        reads = first[..., do.shape[3] :]
        response = torch.matmul(reads.permute(0, 2, 3, 1), do.to(reads.dtype).transpose(1, 2))
    return response, no_tensor(q)


@fake(_response)
def _(do, q, k, v, g, beta, positions, first, second, third, num_householder, scale, use_qk_l2norm, backend):
    response = q.new_empty(q.shape[0], *q.shape[2:], do.shape[3], dtype=compute_dtype(q, k, do))
    if backend != "triton":
        return response, no_tensor(q)
    return response, q.new_empty(triton_shards.response_shape(q, k, do, third), dtype=torch.float32)


@operator("shard_backward")
def _backward(
    do: Tensor,
    leaving: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    g: Tensor | None,
    beta: Tensor,
    positions: Tensor | None,
    entering: Tensor,
    first: Tensor,
    second: Tensor,
    third: Tensor,
    states: Tensor,
    shares: Tensor,
    num_householder: int,
    scale: float,
    use_qk_l2norm: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and beta, each in the dtype of its tensor.

    `leaving` is that of the state that leaves. v is None where triton has the states.
    """
    if backend == "triton":
        saved = [first, second, third, *([states] if states.numel() else [])]
        operands = do, leaving, q, k, v, g, beta, entering, positions
        *most, dg, dbeta, _ = triton_backend.backward(*operands, saved, scale=scale, responses=shares)
    else:
        options = {"scale": scale, "use_qk_l2norm": use_qk_l2norm, "entering": entering}
        saved = second, third
        *most, dg, dbeta, _ = chunk.chunk_backward(do, leaving, q, k, v, g, beta, positions, *saved, **options)
    return *most, no_tensor(q) if g is None else dg.to(g.dtype), dbeta.to(beta.dtype)


@fake(_backward)
def _(do, leaving, q, k, v, g, beta, *rest):
    dv = do.new_empty(*k.shape[:3], do.shape[3])
    dq, dk, dg, dbeta = (no_tensor(q) if x is None else x.new_empty(x.shape) for x in (q, k, g, beta))
    return dq, dk, dv, dg, dbeta


no_gradient(_response)
no_gradient(_backward)

MAP = _map
ENTERING = _entering
LEAVING = _leaving
OUTPUT = _output
RESPONSE = _response
BACKWARD = _backward

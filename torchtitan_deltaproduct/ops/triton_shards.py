"""Our kernels over a shard of a sequence, in the two steps between which ranks exchange what they found.

    shard, *made = affine_map(q, k, v, g, beta, positions)
    o, states = output(q, k, v, entering, gated, packed, *made, scale=K**-0.5, save=True)
    own, responses = response(do, q, k, gated, packed, *made, scale=K**-0.5)
    triton_backend.backward(do, leaving, q, ..., positions, [*made, states], responses=responses, scale=K**-0.5)

A long sequence is scanned in segments anyway, with a pass for the maps of the segments and one from the states they
start from (`triton_backend`): here the state or gradient that comes from other ranks enters between the two. On top
comes a chain of the segments' maps.
"""

import torch
from torch import Tensor

from torchtitan_deltaproduct.ops import triton_backend as backend
from torchtitan_deltaproduct.ops.normalize import full_precision
from torchtitan_deltaproduct.ops.triton_backend import geometry_of


def made_shapes(q: Tensor, k: Tensor, dim_v: int, gated: bool, packed: bool) -> tuple[tuple, tuple, tuple]:
    """Shapes of `prepared` (k's dtype), `factors` and `maps` (float32) of `affine_map`."""
    geometry = geometry_of(q, k, dim_v, gated, packed)
    (prepared, _), (factors, _), _ = backend.saved_shapes(q, k, dim_v, gated, packed, keep_states=False)
    maps = prepared[0], backend.segments_of(geometry, q, k.dtype), geometry.V + geometry.K, geometry.K
    return prepared, factors, maps


def affine_map(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The map [Z | P] of the shard, [B, H, K, V + K] float32, and what `output` goes on with.

    Args:
        q, k, v, g, beta, positions: as `triton_backend.forward` takes them.

    Returns:
        The map; `prepared` and `factors` of the chunks; `maps` of the segments.
    """
    (batch, _, heads, dim), dim_v = q.shape, v.shape[3]
    geometry = geometry_of(q, k, dim_v, g is not None, positions is not None)
    prepared, factors = backend.prepare(geometry, q, k, g, beta, positions)
    cut = backend.segments_of(geometry, q, k.dtype)
    maps = backend.segment_maps(geometry, q, k, v, prepared, factors, cut)
    shard = _chained(maps, geometry.V)
    shard = torch.cat([shard[:, :dim_v, :dim], shard[:, geometry.V : geometry.V + dim, :dim]], 1)
    return shard.mT.contiguous().unflatten(0, (batch, heads)), prepared, factors, maps


def _chained(maps: Tensor, dim_v: int) -> Tensor:
    """The map of all segments, [B*H, V + K, K], rows of Z^T and P^T, from theirs, [B*H, segments, V + K, K]."""
    first, *others = maps.unbind(1)
    with full_precision(maps.device.type):
        for segment in others:
            first = torch.bmm(first, segment[:, dim_v:])
            first[:, :dim_v] += segment[:, :dim_v]
    return first


def output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    entering: Tensor,
    gated: bool,
    packed: bool,
    prepared: Tensor,
    factors: Tensor,
    maps: Tensor,
    *,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """o [B, T, H, V] from the state that enters, [B, H, K, V], and (with `save`) the states of the chunks.

    Args:
        q, k, v, scale: as `triton_backend.forward` takes them.
        gated: whether there was a g.
        packed: whether there were positions.
        prepared, factors, maps: of `affine_map`.
        save: whether a backward pass will want the states.
    """
    geometry = geometry_of(q, k, v.shape[3], gated, packed)
    options = {"scale": scale, "final": False, "save": save}
    o, _, states = backend.scan(geometry, q, k, v, entering, prepared, factors, maps, **options)
    return o, states


def response_shape(q: Tensor, k: Tensor, do: Tensor, maps: Tensor) -> tuple[int, int, int, int]:
    """Shape of the segments' responses."""
    geometry = geometry_of(q, k, do.shape[3], False, False)
    return q.shape[0] * q.shape[2], maps.shape[1], geometry.V, geometry.K


def response(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    gated: bool,
    packed: bool,
    prepared: Tensor,
    factors: Tensor,
    maps: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What o's gradient sends back to the state that enters, [B, H, K, V] float32, and each segment's share of it.

    Args:
        do, q, k, scale: as `triton_backend.backward` takes them.
        gated: whether there was a g.
        packed: whether there were positions.
        prepared, factors, maps: of `affine_map`.
    """
    (batch, _, heads, dim), dim_v, (programs, cut, _, _) = q.shape, do.shape[3], maps.shape
    geometry = geometry_of(q, k, dim_v, gated, packed)
    own = backend.responses_of(geometry, do, q, k, prepared, factors, cut, scale)
    arriving, whole = torch.empty_like(own), own.new_empty(programs, geometry.V, geometry.K)
    backend._combine(geometry, maps, own, None, arriving, whole, cut, reverse=True)
    return backend._unpadded_state(whole, (batch, heads, dim, dim_v)), own

"""Our kernels over a shard of a sequence, in the two steps between which ranks exchange what they found.

    shard, records, factors, maps = affine_map(q, k, v, g, beta, positions, n=2)
    o, records = output(q, k, v, entering, gated, packed, records, factors, maps, n=2, scale=K**-0.5, save=True)
    own, responses = response(do, q, k, gated, packed, records, factors, maps, n=2, scale=K**-0.5)
    triton_backend.backward(do, leaving, q, k, g, beta, positions, records, factors, maps, responses=responses, ...)

A long sequence is scanned in segments anyway, with a pass for the maps of the segments and one from the states they
start from (`triton_backend`): here the state or gradient that comes from other ranks enters between the two. On top
come a chain of the segments' maps and a copy of what the first step prepared of each chunk to where the second adds to
it.
"""

import torch
from torch import Tensor

from torchtitan_deltaproduct.ops import triton_backend as backend
from torchtitan_deltaproduct.ops.normalize import full_precision
from torchtitan_deltaproduct.ops.triton_backend import ROWS, Geometry, launches


def _geometry(q: Tensor, k: Tensor, dim_v: int, gated: bool, packed: bool) -> Geometry:
    return Geometry(k.shape[1] // q.shape[1], backend.native(q.shape[3]), backend.native(dim_v), gated, packed)


def made_shapes(q: Tensor, k: Tensor, dim_v: int, gated: bool, packed: bool) -> tuple[tuple, tuple, tuple]:
    """Shapes of `records` (k's dtype), `factors` and `maps` (float32) of `affine_map`."""
    geometry = _geometry(q, k, dim_v, gated, packed)
    programs, chunks = q.shape[0] * q.shape[2], -(-q.shape[1] // geometry.tokens)
    return (
        (programs, chunks, geometry.width(False)),
        (programs, chunks, geometry.factors, ROWS),
        (programs, backend._cut(geometry, q, chunks, k.dtype), geometry.V + geometry.K, geometry.K),
    )


def affine_map(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, positions: Tensor | None, *, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The map [Z | P] of the shard, [B, H, K, V + K] float32, and what `output` goes on with.

    Args:
        q, k, v, g, beta, positions, n: as `triton_backend.forward` takes them.

    Returns:
        The map; `records` of the chunks without what a backward pass needs; `factors`; `maps` of the segments.
    """
    (batch, length, heads, dim), dim_v = q.shape, v.shape[3]
    gated, packed = g is not None, positions is not None
    geometry = _geometry(q, k, dim_v, gated, packed)
    config, precision = launches(geometry, k.dtype, backend._capability(k.device)), backend._precision(k.dtype)
    of_records, of_factors, of_maps = made_shapes(q, k, dim_v, gated, packed)
    records, factors = k.new_empty(of_records), k.new_empty(of_factors, dtype=torch.float32)
    programs, chunks, _ = of_records
    maps = factors.new_empty(of_maps)
    q, k, v = (backend._padded(x, size) for x, size in ((q, geometry.K), (k, geometry.K), (v, geometry.V)))
    beta, g, positions = (None if x is None else x.contiguous() for x in (beta, g, positions))
    constants = geometry.constants() | {"PREC": precision, "WIDTH": geometry.width(False)}
    backend.prepare_chunks(geometry, config, q, k, g, beta, positions, records, factors)
    (forward_kernel,) = backend._kernels("forward_kernel")
    cut, columns = of_maps[1], min(config["forward"].columns, geometry.K)
    forward_kernel[((geometry.V + geometry.K) // columns * programs, cut)](
        q, k, v, records, factors, None, None, maps, 1.0, length, chunks, -(-chunks // cut), heads,
        **constants, DECAY=geometry.decay, **config["forward"].options(),
        BV=columns, SAVE=False, MODE=1, HAS_IN=False, HAS_OUT=True,
    )  # fmt: skip
    shard = _chained(maps, geometry.V)
    shard = torch.cat([shard[:, :dim_v, :dim], shard[:, geometry.V : geometry.V + dim, :dim]], 1)
    return shard.mT.contiguous().unflatten(0, (batch, heads)), records, factors, maps


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
    records: Tensor,
    factors: Tensor,
    maps: Tensor,
    *,
    n: int,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] from the state that enters, and the records a backward pass needs (with `save`).

    Args:
        q, k, v, n, scale: as `triton_backend.forward` takes them.
        entering: [B, H, K, V].
        gated: whether there was a g.
        packed: whether there were positions.
        records, factors, maps: of `affine_map`.
        save: whether a backward pass will follow.
    """
    (batch, length, heads, _), dim_v = q.shape, v.shape[3]
    geometry = _geometry(q, k, dim_v, gated, packed)
    precision, (programs, chunks, width) = backend._precision(k.dtype), records.shape
    q, k, v = (backend._padded(x, size) for x, size in ((q, geometry.K), (k, geometry.K), (v, geometry.V)))
    if save:
        prepared, records = records, records.new_empty(programs, chunks, geometry.width(True))
        records[..., :width] = prepared
    cut, c = maps.shape[1], launches(geometry, k.dtype, backend._capability(k.device))["forward"]
    starts = factors.new_empty(programs, cut, geometry.V, geometry.K)
    state = backend._state(entering, geometry)
    backend._combine(geometry, maps, maps, state, starts, None, cut, reverse=False, precision=precision)
    o = v.new_empty(batch, length, heads, geometry.V)
    (forward_kernel,) = backend._kernels("forward_kernel")
    forward_kernel[(geometry.V // c.columns * programs, cut)](
        q, k, v, records, factors, o, starts, None, scale, length, chunks, -(-chunks // cut), heads,
        **geometry.constants(), PREC=precision, WIDTH=geometry.width(save), DECAY=geometry.decay, **c.options(),
        BV=c.columns, SAVE=save, MODE=0, HAS_IN=True, HAS_OUT=False,
    )  # fmt: skip
    return backend._trimmed(o, dim_v), records


def response_shape(q: Tensor, k: Tensor, do: Tensor, maps: Tensor) -> tuple[int, int, int, int]:
    """Shape of the segments' responses."""
    geometry = _geometry(q, k, do.shape[3], False, False)
    return q.shape[0] * q.shape[2], maps.shape[1], geometry.V, geometry.K


def response(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    gated: bool,
    packed: bool,
    records: Tensor,
    factors: Tensor,
    maps: Tensor,
    *,
    n: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What o's gradient sends back to the state that enters, [B, H, K, V] float32, and each segment's share of it.

    Args:
        do, q, k, n, scale: as `triton_backend.backward` takes them.
        gated: whether there was a g.
        packed: whether there were positions.
        records: of `output` with `save`.
        factors, maps: of `affine_map`.
    """
    (batch, length, heads, dim), dim_v = q.shape, do.shape[3]
    geometry = _geometry(q, k, dim_v, gated, packed)
    config, precision = launches(geometry, k.dtype, backend._capability(k.device)), backend._precision(k.dtype)
    (programs, chunks, _), cut = records.shape, maps.shape[1]
    own = factors.new_empty(response_shape(q, k, do, maps))
    q, k, do = (backend._padded(x, size) for x, size in ((q, geometry.K), (k, geometry.K), (do, geometry.V)))
    c = config["backward"]
    (backward_kernel,) = backend._kernels("backward_kernel")
    backward_kernel[(geometry.V // c.columns * programs, cut)](
        q, k, records, factors, do, None, None, None, own, scale, length, chunks, -(-chunks // cut), heads,
        **geometry.constants(), PREC=precision, WIDTH=geometry.width(True), DECAY=geometry.decay, BV=c.columns,
        **c.options(), MODE=1, HAS_IN=False, HAS_OUT=True,
    )  # fmt: skip
    arriving, whole = torch.empty_like(own), own.new_empty(programs, geometry.V, geometry.K)
    backend._combine(geometry, maps, own, None, arriving, whole, cut, reverse=True, precision=precision)
    return backend._unpadded_state(whole, (batch, heads, dim, dim_v)), own

"""What context parallelism asks of our kernels: the affine map of a shard, and its outputs' part of dS.

Both are passes that a sequence cut in segments runs anyway (`triton_backend`), here chained to one map of the shard.
"""

import torch
from torch import Tensor

from torchtitan_deltaproduct.ops import triton_backend as backend
from torchtitan_deltaproduct.ops.normalize import full_precision


def affine_map(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, positions: Tensor | None, *, n: int
) -> Tensor:
    """[Z | P], [B, H, K, V + K] float32; arguments as of `triton_backend.forward`."""
    (batch, length, heads, dim), dim_v = q.shape, v.shape[3]
    geometry = backend.Geometry(n, backend._native(dim), backend._native(dim_v), g is not None, positions is not None)
    config = backend.launches(geometry, k.dtype, backend._capability(k.device))
    precision = backend._precision(k.dtype)
    q, k, v = (backend._padded(x, size) for x, size in ((q, geometry.K), (k, geometry.K), (v, geometry.V)))
    beta, g, positions = (None if x is None else x.contiguous() for x in (beta, g, positions))
    chunks, programs = -(-length // geometry.tokens), batch * heads
    cut = backend._cut(geometry, q, chunks, k.dtype)
    records = k.new_empty(programs, chunks, geometry.width(False))
    factors = k.new_empty(programs, chunks, geometry.factors, backend.ROWS, dtype=torch.float32)
    triangles = factors.new_empty(programs, chunks, backend.ROWS, backend.ROWS)
    maps = factors.new_empty(programs, cut, geometry.V + geometry.K, geometry.K)
    constants = geometry.constants() | {"PREC": precision, "WIDTH": geometry.width(False)}
    prepare_kernel, solve_kernel, forward_kernel = backend._kernels("prepare_kernel", "solve_kernel", "forward_kernel")
    prepare_kernel[(chunks * programs,)](
        q, k, beta, g, positions, records, triangles, factors, length, chunks, heads,
        **{name: x for name, x in constants.items() if name != "V"},
        GATED=geometry.gated, PACKED=geometry.packed, **config["prepare"].options(),
    )  # fmt: skip
    solve_kernel[(chunks * programs,)](
        triangles, records, R=backend.ROWS, WIDTH=geometry.width(False),
        FINE="ieee" if precision == "ieee" else "bf16x3", **config["solve"].options(),
    )  # fmt: skip
    columns = min(config["forward"].columns, geometry.K)
    forward_kernel[((geometry.V + geometry.K) // columns * programs, cut)](
        q, k, v, records, factors, None, None, maps, 1.0, length, chunks, -(-chunks // cut), heads,
        **constants, DECAY=geometry.decay, **config["forward"].options(),
        BV=columns, SAVE=False, MODE=1, HAS_IN=False, HAS_OUT=True,
    )  # fmt: skip
    shard = _chained(maps, geometry.V)
    both = torch.cat([shard[:, :dim_v, :dim], shard[:, geometry.V : geometry.V + dim, :dim]], 1)
    return both.mT.contiguous().unflatten(0, (batch, heads))


def _chained(maps: Tensor, dim_v: int) -> Tensor:
    """The map of all segments, [B*H, V + K, K], rows of Z^T and P^T, from theirs, [B*H, segments, V + K, K]."""
    first, *others = maps.unbind(1)
    with full_precision(maps.device.type):
        for segment in others:
            first = torch.bmm(first, segment[:, dim_v:])
            first[:, :dim_v] += segment[:, :dim_v]
    return first


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
) -> Tensor:
    """Gradient of the state that enters, from o's gradient alone, [B, H, K, V] float32.

    Args:
        do, q, k, records, factors, maps: as `triton_backend.backward` takes them.
        gated: whether there was a g.
        packed: whether there were positions.
    """
    (batch, length, heads, dim), dim_v = q.shape, do.shape[3]
    geometry = backend.Geometry(n, backend._native(dim), backend._native(dim_v), gated, packed)
    config, precision = (
        backend.launches(geometry, k.dtype, backend._capability(k.device)),
        backend._precision(k.dtype),
    )
    q, k, do = (backend._padded(x, size) for x, size in ((q, geometry.K), (k, geometry.K), (do, geometry.V)))
    chunks, programs = records.shape[1], batch * heads
    cut = maps.shape[1] if maps.numel() else 1
    own = factors.new_empty(programs, cut, geometry.V, geometry.K)
    c = config["backward"]
    (backward_kernel,) = backend._kernels("backward_kernel")
    backward_kernel[(geometry.V // c.columns * programs, cut)](
        q, k, records, factors, do, None, None, None, own, scale, length, chunks, -(-chunks // cut), heads,
        **geometry.constants(), PREC=precision, WIDTH=geometry.width(True), DECAY=geometry.decay, BV=c.columns,
        **c.options(), MODE=1, HAS_IN=False, HAS_OUT=True,
    )  # fmt: skip
    *others, last = own.unbind(1)
    with full_precision(q.device.type):
        for i in reversed(range(cut - 1)):
            # Rows are columns of dS^T; the state before segment i + 1 is Phi of what enters it.
            last = torch.bmm(last, maps[:, i, geometry.V :].mT) + others[i]
    return backend._unpadded_state(last, (batch, heads, dim, dim_v))

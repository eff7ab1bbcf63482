"""Our Triton kernels as a backend. `triton/` has the kernels and their algebra, `triton_geometry.py` their shapes.

    o, state, saved = forward(q, k, v, None, beta, None, None, scale=K**-0.5, final=True, save=True)
    dq, dk, dv, dg, dbeta, dstate = backward(do, None, q, k, None, None, beta, None, None, saved, scale=K**-0.5)

Deterministic: no atomics, and the configuration is a function of the arguments, never of a measurement at run time, so
that every rank and every restart runs the same code.
"""

import importlib.metadata
import importlib.util
import os
from functools import lru_cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_deltaproduct.ops.launch import launch
from torchtitan_deltaproduct.ops.triton_geometry import (
    DTYPES,
    HEAD_DIMS,
    MAX_HOUSEHOLDER,
    ROWS,
    Geometry,
    launches,
    native,
    segments,
)

MIN_TRITON = (3, 6)
"""The first with products of float32 split in three of bfloat16."""

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def obstacle(
    device_type: str, dtypes: tuple[str, ...], head_dim: int, head_v_dim: int, num_householder: int
) -> str | None:
    """Why our kernels cannot run this, in one line; None if they can."""
    if device_type != "cuda" and not (_INTERPRETED and device_type == "cpu"):
        return f"its kernels need CUDA, the tensors are on {device_type}"
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        return f"q, k and v must share one of {', '.join(DTYPES)}, found {', '.join(dtypes)}"
    if max(head_dim, head_v_dim) > HEAD_DIMS[-1]:
        return f"head_dim is {max(head_dim, head_v_dim)}, its kernels take at most {HEAD_DIMS[-1]}"
    if num_householder > MAX_HOUSEHOLDER:
        return f"num_householder is {num_householder}, its kernels take at most {MAX_HOUSEHOLDER}"
    return _missing()


@lru_cache(maxsize=1)
def measured_here() -> bool:
    """Whether this GPU is of a kind that the configurations were measured on."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def slow_in_float32(head_dim: int, head_v_dim: int, num_householder: int) -> str | None:
    """Why float32 is left to chunk; None where ours are faster (`benchmarks.op --dtype float32`)."""
    if not measured_here():
        return "in which our kernels were never timed on this device"
    if max(head_dim, head_v_dim) > 64:
        return "in which our kernels are not faster for heads of more than 64"
    if Geometry(num_householder, 64, 64, gated=False, packed=False).products(torch.float32) == "ieee":
        return f"in which our kernels are not known to be faster for num_householder = {num_householder}"
    return None


@lru_cache(maxsize=1)
def _missing() -> str | None:
    """What this machine lacks; None if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton, on Linux)"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return f"Triton is {version}, its kernels need {'.'.join(map(str, MIN_TRITON))} or later"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "its kernels need compute capability 8.0 (A100) or later"
    return None


@lru_cache(maxsize=1)
def _kernels() -> SimpleNamespace:
    """The kernels; Triton is imported only where they run."""
    from torchtitan_deltaproduct.ops.triton import local, prepare, scan

    return SimpleNamespace(
        prepare=prepare.prepare_kernel,
        solve=prepare.solve_kernel,
        forward=scan.forward_kernel,
        combine=scan.combine_kernel,
        backward=scan.backward_kernel,
        local=local.local_kernel,
    )


def _padded(x: Tensor, size: int) -> Tensor:
    return x.contiguous() if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1])).contiguous()


def _trimmed(x: Tensor, size: int) -> Tensor:
    return x if x.shape[-1] == size else x[..., :size].contiguous()


@lru_cache
def _capability(device: torch.device) -> int:
    """Compute capability, 90 for Hopper; 90 also where there is no device."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def geometry_of(q: Tensor, k: Tensor, dim_v: int, gated: bool, packed: bool) -> Geometry:
    """Of q [B, T, H, K] and k [B, T*n, H, K]."""
    return Geometry(int(k.shape[1] // q.shape[1]), native(q.shape[3]), native(dim_v), gated, packed)


def saved_shapes(
    q: Tensor, k: Tensor, dim_v: int, gated: bool, packed: bool, keep_states: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `forward` saves."""
    geometry = geometry_of(q, k, dim_v, gated, packed)
    programs, chunks = q.shape[0] * q.shape[2], -(-q.shape[1] // geometry.tokens)
    cut = segments_of(geometry, q, k.dtype)
    maps = (programs, cut, geometry.V + geometry.K, geometry.K) if cut > 1 else (0,)
    saved = [((programs, chunks, geometry.prepared), k.dtype)]
    saved += [((programs, chunks, geometry.factors, ROWS), torch.float32), (maps, torch.float32)]
    return saved + [((programs, chunks, geometry.states), k.dtype)] * keep_states


def segments_of(geometry: Geometry, q: Tensor, dtype: torch.dtype) -> int:
    """In how many segments the rows of q [B, T, H, K] are scanned."""
    columns = launches(geometry, dtype, _capability(q.device))["forward"].columns
    programs, chunks = q.shape[0] * q.shape[2] * geometry.V // columns, -(-q.shape[1] // geometry.tokens)
    wanted = segments(programs, chunks, _multiprocessors(q.device))
    return -(-chunks // -(-chunks // wanted))


def _state(state: Tensor | None, geometry: Geometry) -> Tensor | None:
    """[B, H, K, V] -> [B*H, V, K] float32, padded."""
    if state is None:
        return None
    state = state.float().flatten(0, 1).mT
    return F.pad(state, (0, geometry.K - state.shape[-1], 0, geometry.V - state.shape[-2])).contiguous()


def _unpadded_state(state: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    batch, heads, dim, dim_v = shape
    return state[:, :dim_v, :dim].mT.contiguous().view(batch, heads, dim, dim_v)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    positions: Tensor | None,
    *,
    scale: float,
    final: bool,
    save: bool,
    keep_states: bool = True,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Runs the operator on normalised q and k.

    Args:
        q, k, v, g, beta, initial_state, scale: as in `gated_delta_product`; q, k and v of one dtype.
        positions: [B, T] int32, index of each token in its document, or None. The state is reset where it is 0, except
            at the first token of a row, which `initial_state` enters.
        final: whether to return the state after the last token, float32.
        save: whether to return what the backward needs.
        keep_states: whether the states before the chunks are among it; if not, the backward makes them again from v.

    Returns:
        o [B, T, H, V]; the final state [B, H, K, V] or None; what `backward` calls `saved`.
    """
    gated, packed = g is not None, positions is not None
    geometry = geometry_of(q, k, v.shape[3], gated, packed)
    prepared, factors = prepare(geometry, q, k, g, beta, positions)
    cut = segments_of(geometry, q, k.dtype)
    maps = segment_maps(geometry, q, k, v, prepared, factors, cut) if cut > 1 else factors.new_empty(0)
    o, state, states = scan(
        *(geometry, q, k, v, initial_state, prepared, factors, maps),
        scale=scale,
        final=final,
        save=save and keep_states,
    )
    saved = [prepared, factors, maps] if save else []
    return o, state, saved if states is None else [*saved, states]


def prepare(
    geometry: Geometry, q: Tensor, k: Tensor, g: Tensor | None, beta: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`prepared` [B*H, chunks, geometry.prepared] and `factors` [B*H, chunks, geometry.factors, ROWS] of all chunks."""
    (batch, length, heads, _), precision = q.shape, geometry.products(k.dtype)
    programs, chunks = batch * heads, -(-length // geometry.tokens)
    config, kernels = launches(geometry, k.dtype, _capability(k.device)), _kernels()
    prepared = k.new_empty(programs, chunks, geometry.prepared)
    factors = k.new_empty(programs, chunks, geometry.factors, ROWS, dtype=torch.float32)
    triangles = factors.new_empty(programs, chunks, ROWS, ROWS)
    q, k = _padded(q, geometry.K), _padded(k, geometry.K)
    beta, g, positions = (None if x is None else x.contiguous() for x in (beta, g, positions))
    constants = geometry.constants()
    del constants["V"]
    launch(
        kernels.prepare, (chunks * programs,),
        q, k, beta, g, positions, prepared, triangles, factors, length, chunks, heads, **constants,
        PREC=precision, GATED=geometry.gated, PACKED=geometry.packed, **config["prepare"].options(),
    )  # fmt: skip
    launch(
        kernels.solve, (chunks * programs,), triangles, prepared, factors, R=ROWS, WIDTH=geometry.prepared,
        FACTORS=geometry.factors * ROWS, FINE=precision if k.dtype == torch.float32 else "bf16x3",
        **config["solve"].options(),
    )  # fmt: skip
    return prepared, factors


def segment_maps(
    geometry: Geometry, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor, factors: Tensor, cut: int
) -> Tensor:
    """The affine map of each of `cut` segments, [B*H, cut, V + K, K] float32: rows of Z^T, then of Phi^T."""
    (programs, chunks, _), (length, heads) = prepared.shape, q.shape[1:3]
    c = launches(geometry, k.dtype, _capability(k.device))["forward"]
    columns = min(c.columns, geometry.K)
    q, k, v = _padded(q, geometry.K), _padded(k, geometry.K), _padded(v, geometry.V)
    maps = factors.new_empty(programs, cut, geometry.V + geometry.K, geometry.K)
    launch(
        _kernels().forward, ((geometry.V + geometry.K) // columns * programs, cut),
        q, k, v, prepared, factors, None, None, None, maps, 1.0, length, chunks, -(-chunks // cut), heads,
        **geometry.constants(), PREC=geometry.products(k.dtype), DECAY=geometry.decay, **c.options(),
        BV=columns, SAVE=False, MODE=1, HAS_IN=False, HAS_OUT=True,
    )  # fmt: skip
    return maps


def scan(
    geometry: Geometry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    prepared: Tensor,
    factors: Tensor,
    maps: Tensor,
    *,
    scale: float,
    final: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """o, the final state (`final`) and, with `save`, the states of the chunks [B*H, chunks, geometry.states].

    The sequence is scanned in as many segments as there are maps, in one go if there are none.
    """
    (batch, length, heads, dim), dim_v, (programs, chunks, _) = q.shape, v.shape[3], prepared.shape
    precision, c = geometry.products(k.dtype), launches(geometry, k.dtype, _capability(k.device))["forward"]
    q, k, v = _padded(q, geometry.K), _padded(k, geometry.K), _padded(v, geometry.V)
    o = torch.empty(batch, length, heads, geometry.V, dtype=v.dtype, device=v.device)
    states = prepared.new_empty(programs, chunks, geometry.states) if save else None
    entering, cut = _state(initial_state, geometry), 1
    state = factors.new_empty(programs, geometry.V, geometry.K) if final else None
    if maps.numel():
        first, cut = entering, maps.shape[1]
        entering = factors.new_empty(programs, cut, geometry.V, geometry.K)
        _combine(geometry, maps, maps, first, entering, state, cut, reverse=False)
    last = state if not maps.numel() else None
    launch(
        _kernels().forward, (geometry.V // c.columns * programs, cut),
        q, k, v, prepared, factors, states, o, entering, last, scale, length, chunks, -(-chunks // cut), heads,
        **geometry.constants(), PREC=precision, DECAY=geometry.decay, **c.options(),
        BV=c.columns, SAVE=save, MODE=0, HAS_IN=entering is not None, HAS_OUT=last is not None,
    )  # fmt: skip
    state = _unpadded_state(state, (batch, heads, dim, dim_v)) if final else None
    return _trimmed(o, dim_v), state, states


def responses_of(
    geometry: Geometry, do: Tensor, q: Tensor, k: Tensor, prepared: Tensor, factors: Tensor, cut: int, scale: float
) -> Tensor:
    """What do [B, T, H, V] sends back to the state before each of `cut` segments, [B*H, cut, V, K] float32."""
    (programs, chunks, _), (length, heads) = prepared.shape, q.shape[1:3]
    c = launches(geometry, k.dtype, _capability(k.device))["backward"]
    q, k, do = _padded(q, geometry.K), _padded(k, geometry.K), _padded(do, geometry.V)
    responses = factors.new_empty(programs, cut, geometry.V, geometry.K)
    launch(
        _kernels().backward, (geometry.V // c.columns * programs, cut),
        q, k, prepared, factors, do, None, None, None, responses, scale, length, chunks, -(-chunks // cut), heads,
        **geometry.constants(), PREC=geometry.products(k.dtype), DECAY=geometry.decay, BV=c.columns, **c.options(),
        MODE=1, HAS_IN=False, HAS_OUT=True,
    )  # fmt: skip
    return responses


def backward(
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
    *,
    scale: float,
    responses: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of q, k, v, g, beta (float32) and, if there was one, of the initial state.

    Args:
        do: [B, T, H, V].
        dstate: [B, H, K, V] or None, gradient of the final state.
        v: read only where `saved` has no states.
        saved: of `forward`.
        responses: `responses_of`, if known (`triton_shards`).
    """
    prepared, factors, maps, *states = saved
    (batch, length, heads, dim), dim_v, (programs, chunks, _) = q.shape, do.shape[3], prepared.shape
    geometry = geometry_of(q, k, dim_v, g is not None, positions is not None)
    config, kernels = launches(geometry, k.dtype, _capability(k.device)), _kernels()
    if not states:
        options = {"scale": scale, "final": False, "save": True}
        states = [scan(geometry, q, k, v, initial_state, prepared, factors, maps, **options)[2]]
    q, k, do = (_padded(x, size) for x, size in ((q, geometry.K), (k, geometry.K), (do, geometry.V)))
    cut = maps.shape[1] if maps.numel() else 1
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dv = do.new_empty(*k.shape[:3], geometry.V)
    dstates = prepared.new_empty(programs, chunks, geometry.V, geometry.K)
    arriving, leaving = _state(dstate, geometry), None
    if initial_state is not None:
        leaving = factors.new_empty(programs, geometry.V, geometry.K)
    last = leaving if cut == 1 else None
    if cut > 1:
        if responses is None:
            responses = responses_of(geometry, do, q, k, prepared, factors, cut, scale)
        first, arriving = arriving, torch.empty_like(responses)
        _combine(geometry, maps, responses, first, arriving, leaving, cut, reverse=True)
    constants, c = geometry.constants() | {"PREC": geometry.products(k.dtype)}, config["backward"]
    launch(
        kernels.backward, (geometry.V // c.columns * programs, cut),
        q, k, prepared, factors, do, dv, dstates, arriving, last, scale, length, chunks, -(-chunks // cut), heads,
        **constants, DECAY=geometry.decay, BV=c.columns, **c.options(),
        MODE=0, HAS_IN=arriving is not None, HAS_OUT=last is not None,
    )  # fmt: skip
    c = config["local"]
    dbeta = torch.empty(beta.shape, dtype=torch.float32, device=beta.device)
    dg = None if g is None else torch.empty(g.shape, dtype=torch.float32, device=g.device)
    launch(
        kernels.local, (chunks * programs,),
        q, k, prepared, factors, *states, positions, dstates, do, dv, dq, dk, dbeta, dg, scale, length, chunks, heads,
        **constants, BK=c.columns, STAGES=c.stages, GATED=geometry.gated, PACKED=geometry.packed, **c.options(),
    )  # fmt: skip
    dinitial = None if leaving is None else _unpadded_state(leaving, (batch, heads, dim, dim_v))
    return _trimmed(dq, dim), _trimmed(dk, dim), _trimmed(dv, dim_v), dg, dbeta, dinitial


def _combine(
    geometry: Geometry,
    maps: Tensor,
    responses: Tensor,
    first: Tensor | None,
    entering: Tensor,
    last: Tensor | None,
    cut: int,
    *,
    reverse: bool,
) -> None:
    """Fills `entering`, what each segment starts from, and `last`, what leaves the other end."""
    columns = min(16, geometry.V)
    launch(
        _kernels().combine, (geometry.V // columns * maps.shape[0],),
        maps, responses, first, entering, last, cut,
        K=geometry.K, V=geometry.V, BV=columns, HAS_IN=first is not None, HAS_OUT=last is not None, REVERSE=reverse,
        PREC="tf32x3", num_warps=8, num_stages=1,
    )  # fmt: skip

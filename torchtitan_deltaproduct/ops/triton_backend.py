"""Our Triton kernels as a backend: shapes, configurations and launches. `triton/` has the kernels and their algebra.

    o, state, *saved = forward(q, k, v, None, beta, None, None, n=2, scale=K**-0.5, final=True, save=True)

Deterministic: no atomics, and the configuration is a function of the arguments, never of a measurement at run time, so
that every rank and every restart runs the same code.
"""

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 64
"""R, rows of a chunk."""

DTYPES = ("bfloat16", "float16", "float32")
MAX_HOUSEHOLDER = 8
MIN_TRITON = (3, 6)
"""The first with products of float32 split in three of bfloat16."""

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

HEAD_DIMS = (16, 32, 64, 128)
"""K and V of the kernels; other sizes up to 128 are padded with zeros."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: columns of V (`local`: of K) a program or a step, warps, stages of its pipeline."""

    columns: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Geometry:
    """What the kernels are specialised to."""

    n: int
    K: int
    V: int
    gated: bool
    packed: bool

    @property
    def tokens(self) -> int:
        """C, whole tokens of a chunk."""
        return ROWS // self.n

    @property
    def padded_tokens(self) -> int:
        """C rounded up to a tile."""
        return max(16, 1 << (self.tokens - 1).bit_length())

    @property
    def decay(self) -> bool:
        return self.gated or self.packed

    @property
    def factors(self) -> int:
        """Rows of a chunk's factors: beta; with decays also enter, leave, G and across."""
        return 5 if self.decay else 1

    def width(self, save: bool) -> int:
        """Numbers in a chunk's record: T, P, enter . q with decays; and for the backward D and the state before."""
        prepared = (ROWS + self.padded_tokens) * ROWS + self.decay * self.padded_tokens * self.K
        return prepared + self.V * (ROWS + self.K) if save else prepared

    def constants(self) -> dict[str, int]:
        return {"K": self.K, "V": self.V, "N": self.n, "C": self.tokens, "CP": self.padded_tokens, "R": ROWS}


def launches(geometry: Geometry, dtype: torch.dtype, capability: int) -> dict[str, Launch]:
    """The configuration of each kernel: the fastest measured on Hopper; before it one that fits, not measured.

    The scans want three tiles in flight; a device with less shared memory than Hopper's 227 KB gets two (A100) or one.
    """
    columns, keys, solve = min(64, geometry.V), min(64, geometry.K), Launch(0, 1, 1)
    if dtype == torch.float32:
        one = Launch(min(32, geometry.V), 4, 1)
        return {"prepare": one, "solve": solve, "forward": one, "backward": one, "local": Launch(keys, 8, 1)}
    stages = 3 if capability // 10 in (9, 10) else 2 if capability == 80 else 1
    if capability < 90:
        scan = Launch(min(32, geometry.V), 4, stages)
        return {"prepare": Launch(0, 8, 1), "solve": solve, "forward": scan, "backward": scan,
                "local": Launch(keys, 8, 1)}  # fmt: skip
    alone = geometry.n == 1
    return {
        "prepare": Launch(0, 4, 1),
        "solve": solve,
        "forward": Launch(columns, 8 if alone and not geometry.decay else 4, stages),
        "backward": Launch(columns, 4, stages),
        # Halves of K: with a gate, whose tiles want the registers; with n = 1, where they are as fast.
        "local": Launch(keys if alone or geometry.gated else geometry.K, 4, 2 if geometry.gated and not alone else 1),
    }


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


def segments(programs: int, chunks: int, multiprocessors: int) -> int:
    """In how many segments to cut the sequence, so that one wave of programs fills the device; 1 is not to cut.

    Cutting costs a second pass, so it pays from three segments on; each keeps at least 8 chunks.
    """
    fitting = multiprocessors // max(1, programs)
    return 1 if fitting < 3 else min(fitting, max(1, chunks // 8))


def _kernels(*names: str) -> list:
    """Kernels by name; Triton is imported only where they run."""
    from torchtitan_deltaproduct.ops.triton import local, prepare, scan

    return [next(getattr(module, name) for module in (prepare, scan, local) if hasattr(module, name)) for name in names]


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def _padded(x: Tensor, size: int) -> Tensor:
    return x.contiguous() if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1])).contiguous()


def _trimmed(x: Tensor, size: int) -> Tensor:
    return x if x.shape[-1] == size else x[..., :size].contiguous()


def native(size: int) -> int:
    """The smallest size of the kernels that holds `size`."""
    return next(native for native in HEAD_DIMS if native >= size)


def _capability(device: torch.device) -> int:
    """Compute capability, 90 for Hopper; 90 also where there is no device."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def saved_shapes(q: Tensor, k: Tensor, v: Tensor, gated: bool, packed: bool) -> tuple[tuple, tuple, tuple]:
    """Shapes of `records` (k's dtype), `factors` and `maps` (float32) with `save`."""
    batch, length, heads, _ = q.shape
    geometry = Geometry(k.shape[1] // length, native(k.shape[3]), native(v.shape[3]), gated, packed)
    chunks = -(-length // geometry.tokens)
    cut = _cut(geometry, q, chunks, k.dtype)
    maps = (batch * heads, cut, geometry.V + geometry.K, geometry.K) if cut > 1 else (0,)
    return (batch * heads, chunks, geometry.width(True)), (batch * heads, chunks, geometry.factors, ROWS), maps


def _cut(geometry: Geometry, q: Tensor, chunks: int, dtype: torch.dtype) -> int:
    """Number of segments."""
    columns = launches(geometry, dtype, _capability(q.device))["forward"].columns
    programs = q.shape[0] * q.shape[2] * geometry.V // columns
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
    n: int,
    scale: float,
    final: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Runs the operator on normalised q and k.

    Args:
        q, k, v, g, beta, initial_state, scale: as in `gated_delta_product`; q, k and v of one dtype.
        positions: [B, T] int32, index of each token in its document, or None. The state is reset where it is 0, except
            at the first token of a row, which `initial_state` enters.
        n: micro-steps a token.
        final: whether to return the state after the last token, float32.
        save: whether to keep what the backward needs.

    Returns:
        o [B, T, H, V]; the final state [B, H, K, V] or None; and records, factors and maps for the backward.
    """
    (batch, length, heads, dim), dim_v = q.shape, v.shape[3]
    geometry = Geometry(n, native(dim), native(dim_v), g is not None, positions is not None)
    config, precision = launches(geometry, k.dtype, _capability(k.device)), _precision(k.dtype)
    q, k, v = _padded(q, geometry.K), _padded(k, geometry.K), _padded(v, geometry.V)
    beta, g, positions = (None if x is None else x.contiguous() for x in (beta, g, positions))
    chunks, programs = -(-length // geometry.tokens), batch * heads
    cut = _cut(geometry, q, chunks, k.dtype)
    segment = -(-chunks // cut)
    o = torch.empty(batch, length, heads, geometry.V, dtype=v.dtype, device=v.device)
    records = k.new_empty(programs, chunks, geometry.width(save))
    factors = k.new_empty(programs, chunks, geometry.factors, ROWS, dtype=torch.float32)
    maps = factors.new_empty((programs, cut, geometry.V + geometry.K, geometry.K) if cut > 1 else (0,))
    prepare_chunks(geometry, config, q, k, g, beta, positions, records, factors)
    (forward_kernel,) = _kernels("forward_kernel")
    c = config["forward"]
    constants = geometry.constants() | {"PREC": precision, "WIDTH": geometry.width(save)}
    constants |= {"DECAY": geometry.decay, **c.options()}
    state_in = _state(initial_state, geometry)
    state_out = factors.new_empty(programs, geometry.V, geometry.K) if final else None
    entering = state_in
    if cut > 1:
        narrow = min(c.columns, geometry.K)
        forward_kernel[((geometry.V + geometry.K) // narrow * programs, cut)](
            q, k, v, records, factors, o, None, maps, scale, length, chunks, segment, heads,
            **constants, BV=narrow, SAVE=False, MODE=1, HAS_IN=False, HAS_OUT=True,
        )  # fmt: skip
        entering = factors.new_empty(programs, cut, geometry.V, geometry.K)
        _combine(geometry, maps, maps, state_in, entering, state_out, cut, reverse=False, precision=precision)
    forward_kernel[(geometry.V // c.columns * programs, cut)](
        q, k, v, records, factors, o, entering, state_out if cut == 1 else None, scale, length, chunks, segment, heads,
        **constants, BV=c.columns, SAVE=save, MODE=0, HAS_IN=entering is not None, HAS_OUT=final and cut == 1,
    )  # fmt: skip
    state = _unpadded_state(state_out, (batch, heads, dim, dim_v)) if final else None
    return _trimmed(o, dim_v), state, records, factors, maps


def prepare_chunks(
    geometry: Geometry,
    config: dict[str, Launch],
    q: Tensor,
    k: Tensor,
    g: Tensor | None,
    beta: Tensor,
    positions: Tensor | None,
    records: Tensor,
    factors: Tensor,
) -> None:
    """Fills `factors`, and `records` but for what a backward pass needs; operands contiguous and padded."""
    (programs, chunks, width), (length, heads) = records.shape, q.shape[1:3]
    triangles, precision = factors.new_empty(programs, chunks, ROWS, ROWS), _precision(k.dtype)
    prepare_kernel, solve_kernel = _kernels("prepare_kernel", "solve_kernel")
    constants = {name: x for name, x in geometry.constants().items() if name != "V"}
    prepare_kernel[(chunks * programs,)](
        q, k, beta, g, positions, records, triangles, factors, length, chunks, heads, **constants,
        PREC=precision, WIDTH=width, GATED=geometry.gated, PACKED=geometry.packed, **config["prepare"].options(),
    )  # fmt: skip
    solve_kernel[(chunks * programs,)](
        triangles, records, factors, R=ROWS, WIDTH=width, FACTORS=geometry.factors * ROWS,
        FINE="ieee" if precision == "ieee" else "bf16x3", **config["solve"].options(),
    )  # fmt: skip


def backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    g: Tensor | None,
    beta: Tensor,
    positions: Tensor | None,
    records: Tensor,
    factors: Tensor,
    maps: Tensor,
    *,
    n: int,
    scale: float,
    initial: bool,
    responses: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of q, k, v, g, beta (float32) and, with `initial`, of the initial state.

    Args:
        do: [B, T, H, V].
        dstate: [B, H, K, V] or None, gradient of the final state.
        records, factors, maps: of `forward` with `save`.
        responses: what do sends back to the state before each segment, if known (`triton_shards`).
    """
    (batch, length, heads, dim), dim_v = q.shape, do.shape[3]
    geometry = Geometry(n, native(dim), native(dim_v), g is not None, positions is not None)
    config, precision = launches(geometry, k.dtype, _capability(k.device)), _precision(k.dtype)
    q, k, do = (_padded(x, size) for x, size in ((q, geometry.K), (k, geometry.K), (do, geometry.V)))
    chunks, programs = records.shape[1], batch * heads
    cut = maps.shape[1] if maps.numel() else 1
    segment = -(-chunks // cut)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dv = do.new_empty(*k.shape[:3], geometry.V)
    dstates = records.new_empty(programs, chunks, geometry.V, geometry.K)
    constants = geometry.constants() | {"PREC": precision, "WIDTH": geometry.width(True)}
    backward_kernel, local_kernel = _kernels("backward_kernel", "local_kernel")
    c = config["backward"]
    shared = constants | {"DECAY": geometry.decay, "BV": c.columns, **c.options()}
    dstate_in = _state(dstate, geometry)
    dstate_out = factors.new_empty(programs, geometry.V, geometry.K) if initial else None
    arriving, grid = dstate_in, (geometry.V // c.columns * programs, cut)
    if cut > 1:
        if responses is None:
            responses = factors.new_empty(programs, cut, geometry.V, geometry.K)
            backward_kernel[grid](
                q, k, records, factors, do, dv, dstates, None, responses, scale, length, chunks, segment, heads,
                **shared, MODE=1, HAS_IN=False, HAS_OUT=True,
            )  # fmt: skip
        arriving = torch.empty_like(responses)
        _combine(geometry, maps, responses, dstate_in, arriving, dstate_out, cut, reverse=True, precision=precision)
    backward_kernel[grid](
        q, k, records, factors, do, dv, dstates, arriving, dstate_out if cut == 1 else None, scale, length, chunks,
        segment, heads, **shared, MODE=0, HAS_IN=arriving is not None, HAS_OUT=initial and cut == 1,
    )  # fmt: skip
    c = config["local"]
    dbeta = torch.empty(beta.shape, dtype=torch.float32, device=beta.device)
    dg = None if g is None else torch.empty(g.shape, dtype=torch.float32, device=g.device)
    local_kernel[(chunks * programs,)](
        q, k, records, factors, positions, dstates, do, dv, dq, dk, dbeta, dg, scale, length, chunks, heads,
        **constants, BK=c.columns, STAGES=c.stages, GATED=geometry.gated, PACKED=geometry.packed, **c.options(),
    )  # fmt: skip
    dinitial = _unpadded_state(dstate_out, (batch, heads, dim, dim_v)) if initial else None
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
    precision: str,
) -> None:
    """Fills `entering`, what each segment starts from, and `last`, what leaves the other end."""
    columns = min(16, geometry.V)
    (combine_kernel,) = _kernels("combine_kernel")
    combine_kernel[(geometry.V // columns * maps.shape[0],)](
        maps, responses, first, entering, last, cut,
        K=geometry.K, V=geometry.V, BV=columns, HAS_IN=first is not None, HAS_OUT=last is not None, REVERSE=reverse,
        PREC="ieee" if precision == "ieee" else "tf32x3", num_warps=8, num_stages=1,
    )  # fmt: skip

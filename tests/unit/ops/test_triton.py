"""Our kernels where there is no GPU: their values under the interpreter, and what they compile to."""

import re
from types import SimpleNamespace

import pytest
import torch

from tests.unit.ops.triton_cpu import compile_launch, run_interpreted
from torchtitan_deltaproduct.ops import triton_backend
from torchtitan_deltaproduct.ops.triton_backend import ROWS, Geometry, launches

SPILLS = {"local_kernel": 400, "forward_kernel": 64, "backward_kernel": 40, "solve_kernel": 8}
"""Most instructions that may go to local memory; the gated local kernel at K = V = 128 is the worst. Others: none."""


def test_interpreted():
    run_interpreted("tests/unit/ops/interpreted_triton.py")


def shipped(geometry: Geometry, dtype: torch.dtype, capability: int):
    """(kernel, its arguments on the meta device, constants and options) of a forward and a backward pass."""
    launched = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, _grid):
            return lambda *args, **options: launched.append((self.kernel, args, options))

    recorders = SimpleNamespace(**{name: Recorder(kernel) for name, kernel in vars(triton_backend._kernels()).items()})
    patch = pytest.MonkeyPatch()
    patch.setattr(triton_backend, "_kernels", lambda: recorders)
    patch.setattr(triton_backend, "_capability", lambda _device: capability)
    n, meta = geometry.n, {"device": "meta", "dtype": dtype}
    q, do = torch.empty(2, 256, 4, geometry.K, **meta), torch.empty(2, 256, 4, geometry.V, **meta)
    k, v = torch.empty(2, 256 * n, 4, geometry.K, **meta), torch.empty(2, 256 * n, 4, geometry.V, **meta)
    beta = torch.empty(2, 256 * n, 4, device="meta")
    g = torch.empty(2, 256, 4, device="meta") if geometry.gated else None
    positions = torch.empty(2, 256, device="meta", dtype=torch.int32) if geometry.packed else None
    options = {"scale": 0.1}
    _, _, saved = triton_backend.forward(q, k, v, g, beta, None, positions, final=False, save=True, **options)
    triton_backend.backward(do, None, q, k, None, g, beta, None, positions, saved, **options)
    patch.undo()
    assert len(launched) == 5
    return launched


def stale_tiles(ttgir: str) -> int:
    """Pipelined loops that refill a one-deep buffer which a product in flight may still read (Triton 3.6)."""
    one = set(re.findall(r"%(\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<1x", ttgir))
    index = dict(re.findall(r"%(\w+) = ttg\.memdesc_index %(\w+)\[", ttgir))
    views = dict(re.findall(r"%(\w+) = ttg\.memdesc_trans %(\w+)", ttgir))
    count = 0
    for loop in re.split(r"scf\.for ", ttgir)[1:]:
        body = loop.split("scf.yield")[0]
        read = {name for pair in re.findall(r"warp_group_dot %(\w+), %(\w+),", body) for name in pair}
        read = {index.get(views.get(name, name)) for name in read}
        written = {index.get(x) for x in re.findall(r"async_copy_global_to_local %\w+, %(\w+)", body)}
        in_flight = re.search(r"warp_group_dot_wait .*pendings = [1-9]", body)
        count += bool(in_flight) and len(read & written & one)
    return count


def transposed_results(ttgir: str) -> int:
    """Products' transposed results stored for another product: miscompiled on Hopper (fla #640)."""
    layouts = re.findall(r"#(\w+) = #ttg\.linear", ttgir)
    stored = r"ttg\.local_alloc %\w+ : \(tensor<[^>]*, #"
    return sum(len(re.findall(stored + layout + r">\)", ttgir)) for layout in layouts)


@pytest.mark.parametrize(("geometry", "capability"), [
    (Geometry(1, 128, 128, False, False), 90), (Geometry(2, 128, 128, False, True), 90),
    (Geometry(3, 128, 128, True, False), 90), (Geometry(2, 32, 32, True, True), 90),
    (Geometry(3, 128, 128, True, False), 80),
    *(pytest.param(Geometry(*geometry), 80, marks=pytest.mark.slow)
      for geometry in ((1, 128, 128, False, False), (2, 128, 128, False, True), (2, 32, 32, True, True))),
])  # fmt: skip
def test_shipped_configurations_compile(geometry, capability):
    for kernel, args, options in shipped(geometry, torch.bfloat16, capability):
        compiled = compile_launch(kernel, capability, *args, **options)
        name = kernel.fn.__name__
        print(name, capability, compiled.registers, compiled.spills, compiled.shared)
        if capability == 90:
            assert compiled.spills <= SPILLS.get(name, 0), (name, compiled.spills)
        assert transposed_results(compiled.ttgir) == 0, name
        assert stale_tiles(compiled.ttgir) == 0, name
        limit = {90: 227, 80: 163}[capability]
        assert compiled.shared <= limit * 1024, (name, compiled.shared)
        if capability == 90 and geometry.K == 128 and name in ("forward_kernel", "backward_kernel", "local_kernel"):
            assert "tt.dot " not in compiled.ttgir, f"{name}: a product left the wgmma road"


@pytest.mark.parametrize("geometry", [
    Geometry(2, 32, 32, False, False), pytest.param(Geometry(1, 64, 64, True, True), marks=pytest.mark.slow),
    pytest.param(Geometry(4, 32, 32, True, False), marks=pytest.mark.slow),
])  # fmt: skip
def test_shipped_configurations_of_float32_compile(geometry):
    """Tensor cores do the products where they are split in three, and the scans keep their tiles in registers."""
    split = geometry.products(torch.float32) == "tf32x3"
    assert split == (geometry.n < 4)
    for kernel, args, options in shipped(geometry, torch.float32, 90):
        compiled = compile_launch(kernel, 90, *args, **options)
        name = kernel.fn.__name__
        print(name, compiled.registers, compiled.spills, compiled.shared)
        assert compiled.shared <= 227 * 1024, (name, compiled.shared)
        if split:
            assert any("MMA" in opcode for opcode in compiled.opcodes), name
            assert compiled.spills <= (1500 if name == "local_kernel" else 100), (name, compiled.spills)


@pytest.mark.parametrize("n", range(1, 9))
def test_geometry(n):
    geometry = Geometry(n, 128, 64, False, False)
    assert geometry.tokens * n <= ROWS < (geometry.tokens + 1) * n
    assert geometry.padded_tokens >= max(16, geometry.tokens)
    config = launches(geometry, torch.bfloat16, 90)
    assert geometry.V % config["forward"].columns == 0
    assert geometry.products(torch.float32) == ("tf32x3" if n < 4 else "ieee")


def test_segments_fill_the_device_once():
    assert triton_backend.segments(128, 195, 132) == 1
    assert triton_backend.segments(12, 3121, 132) == 11
    assert triton_backend.segments(12, 20, 132) == 2

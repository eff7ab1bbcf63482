"""The fused short convolution: parity under Triton's interpreter, and what its kernels compile to."""

import pytest
import torch

from tests.unit.ops.triton_cpu import compile_launch, run_interpreted
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.ops import short_conv
from torchtitan_deltaproduct.ops.triton import short_conv as kernels


def test_interpreted():
    run_interpreted("tests/unit/ops/interpreted_short_conv.py")


def compiled(capability: int, width: int, head_dim: int | None, documents: bool, with_halo: bool = False):
    """Both kernels for bfloat16 x, a slice of a wider tensor, and float32 weights."""
    channels = 6 * (head_dim or 128)
    x = torch.empty(2, 501, 3 * channels, dtype=torch.bfloat16, device="meta")[..., channels : 2 * channels]
    weight = torch.empty(channels, width, device="meta")
    positions = torch.empty(2, 501, dtype=torch.int32, device="meta") if documents else None
    y, ratio = short_conv.outputs(x, head_dim)
    sizes = short_conv.sizes(x)
    halo = torch.empty(2, width - 1, channels, dtype=torch.bfloat16, device="meta") if with_halo else None
    _, options = short_conv.configuration(x, weight, positions, head_dim, halo, kernels.FORWARD)
    forward = compile_launch(
        kernels.short_conv_forward, capability, x, weight, positions, halo, y, ratio, *sizes, **options
    )
    _, options = short_conv.configuration(x, weight, positions, head_dim, halo, kernels.backward_config(width))
    backward = compile_launch(
        kernels.short_conv_backward, capability, x, weight, positions, halo, y, y, halo, ratio, *sizes, **options
    )
    return forward, backward


# As training uses them; the others, seven seconds each where nothing is cached, with -m slow.
USUAL = ((90, 4, None, True, False), (90, 4, 128, True, False), (90, 4, 128, True, True), (80, 4, 128, True, False),
         (90, 8, 128, True, True))  # fmt: skip
ALL = [
    (capability, width, head_dim, documents, halo)
    for capability in (80, 90)
    for width, head_dim in ((2, 128), (4, None), (4, 64), (4, 128), (8, 128))
    for documents, halo in ((False, False), (True, False), (True, True))
]


@pytest.mark.parametrize(
    ("capability", "width", "head_dim", "documents", "halo"),
    [pytest.param(*case, marks=() if case in USUAL else pytest.mark.slow) for case in ALL],
)
def test_compiled_without_spills(capability, width, head_dim, documents, halo):
    forward, backward = compiled(capability, width, head_dim, documents, halo)
    assert forward.spills == backward.spills == 0
    if width == 4:
        # Three blocks of 128 threads share the 65,536 registers of a multiprocessor.
        assert max(forward.registers, backward.registers) <= 168


@pytest.mark.parametrize("head_dim", [None, 128])
def test_compiled_accesses_are_wide(head_dim):
    forward, backward = compiled(90, 4, head_dim, True)
    numbers = {"LDG.E", "STG.E"}  # positions and ratios, one number each
    for kernel, bits in ((forward, 128), (backward, 64)):
        accesses = {name for name in kernel.opcodes if name.split(".")[0] in ("LDG", "STG")} - numbers
        assert {f"LDG.E.{bits}", f"STG.E.{bits}"} <= accesses <= {f"LDG.E.{bits}", f"STG.E.{bits}", "LDG.E.128"}
    # One store a token of a group, for groups with and without the start of a document.
    assert forward.opcodes["STG.E.128"] == 2 * kernels.FORWARD["GROUP"]


def test_obstacles_are_named():
    x, weight = torch.randn(1, 5, 8), torch.randn(8, 4)
    with pytest.raises(ConfigError, match="need CUDA, x is on cpu"):
        short_conv.short_conv(x, weight)
    x = torch.empty(1, 5, 8, device="meta")
    assert short_conv.obstacle(x, 4) == "its kernels need CUDA, x is on meta"

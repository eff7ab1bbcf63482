"""The fused short convolution on a GPU: milliseconds beside the floor of its bytes and the compiled definition.

    python -m benchmarks.short_conv                        # B=8, T=4096: q 768, k 2304 (normalised), v 2304 (plain)
    python -m benchmarks.short_conv --documents 512        # packed documents of 512 tokens
    python -m benchmarks.short_conv --sweep                # other tiles than the shipped ones

The floor counts x and y (forward), x, dy and dx (backward), at the speed at which this GPU copies a gigabyte. The
compiled definition is PyTorch's own, fused by Inductor, its backward alone timed. Medians of cold-cache runs.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks.tables import columns
from torchtitan_deltaproduct.models.conv import sum_of_taps
from torchtitan_deltaproduct.ops.normalize import l2norm

CASES = {"q": (768, 128), "k": (2304, 128), "v": (2304, None)}
FORWARD_TILES = [
    {},
    {"STEPS": 32},
    {"STEPS": 128},
    {"GROUP": 2},
    {"STREAMS": 2},
    {"STREAMS": 2, "GROUP": 8},
    {"num_warps": 2, "STREAMS": 2},
]
BACKWARD_TILES = [
    {},
    {"STEPS": 64},
    {"STEPS": 256},
    {"GROUP": 2, "maxnreg": 128},
    {"STREAMS": 4, "STEPS": 64, "GROUP": 2, "maxnreg": 255},
    {"STREAMS": 4, "STEPS": 64, "GROUP": 1, "maxnreg": 255},
    {"num_warps": 2, "STREAMS": 1, "STEPS": 256},
]
"""What --sweep changes of `ops.triton.short_conv.FORWARD` and `BACKWARD`."""


def definition(x: Tensor, weight: Tensor, positions: Tensor | None, head_dim: int | None) -> Tensor:
    """What `ops.short_conv.short_conv` computes, in float32 or better and rounded once; weight: [C, W]."""
    y = F.silu(sum_of_taps(F.pad(x, (0, 0, weight.shape[1] - 1, 0)), weight.unsqueeze(1), positions))
    if head_dim is not None:
        y = l2norm(y.unflatten(2, (-1, head_dim))).flatten(2)
    return y.to(x.dtype)


def milliseconds(function: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(function, return_mode="median")


def copy_speed() -> float:
    """Bytes a millisecond, read and written, of a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source))


def inputs(args: argparse.Namespace, channels: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x, a slice of a fused projection, weight, positions and dy."""
    torch.manual_seed(0)
    wide = torch.randn(args.batch, args.tokens, sum(c for c, _ in CASES.values()), device="cuda", dtype=torch.bfloat16)
    x = wide[..., :channels].requires_grad_()
    weight = torch.randn(channels, args.width, device="cuda", requires_grad=True)
    positions = None
    if args.documents:
        position = torch.arange(args.tokens, device="cuda", dtype=torch.int32) % args.documents
        positions = position.repeat(args.batch, 1)
    return x, weight, positions, torch.randn(args.batch, args.tokens, channels, device="cuda", dtype=torch.bfloat16)


def both(args: argparse.Namespace, channels: int, head_dim: int | None) -> tuple[float, float]:
    """Milliseconds of the kernels, forward and backward."""
    from torchtitan_deltaproduct.ops.short_conv import BACKWARD, FORWARD

    x, weight, positions, dy = (None if t is None else t.detach() for t in inputs(args, channels))
    return (
        milliseconds(lambda: FORWARD([x], [weight], positions, [head_dim or 0])),
        milliseconds(lambda: BACKWARD([dy], [x], [weight], positions, [head_dim or 0])),
    )


def compiled(args: argparse.Namespace, channels: int, head_dim: int | None) -> tuple[float, float]:
    """Milliseconds of the compiled definition, forward (keeping what backward needs) and backward."""
    x, weight, positions, dy = inputs(args, channels)
    function = torch.compile(definition, fullgraph=True, dynamic=False)
    y = function(x, weight, positions, head_dim)
    return (
        milliseconds(lambda: function(x, weight, positions, head_dim)),
        milliseconds(lambda: torch.autograd.grad(y, (x, weight), dy, retain_graph=True)),
    )


def compare(args: argparse.Namespace) -> Table:
    speed = copy_speed()
    caption = f"floor: bytes at {speed / 1e9:.2f} TB/s, the speed of a copy"
    table = Table(*columns("", "ms", "floor", "of floor", "compiled", "ratio"), caption=caption)
    totals = torch.zeros(2, 3)
    for name, (channels, head_dim) in CASES.items():
        size = 2 * args.batch * args.tokens * channels
        ours, theirs = both(args, channels, head_dim), compiled(args, channels, head_dim)
        for i, way in enumerate(("forward", "backward")):
            row = torch.tensor([ours[i], (2 + i) * size / speed, theirs[i]])
            totals[i] += row
            _add_row(table, f"{name} {way}", row)
    for i, way in enumerate(("forward", "backward")):
        _add_row(table, f"all {way}", totals[i])
    return table


def _add_row(table: Table, name: str, row: Tensor) -> None:
    ours, floor, theirs = row.tolist()
    figures = f"{ours:.3f}", f"{floor:.3f}", f"{100 * floor / ours:.0f} %", f"{theirs:.3f}", f"{theirs / ours:.1f}x"
    table.add_row(name, *figures)


def sweep(args: argparse.Namespace) -> Table:
    from torchtitan_deltaproduct.ops.triton import short_conv as kernels

    table = Table(*columns("", "changed", *CASES), caption="ms")
    ways = ("forward", kernels.FORWARD, FORWARD_TILES), ("backward", kernels.BACKWARD, BACKWARD_TILES)
    for i, (way, shipped, tiles) in enumerate(ways):
        before = dict(shipped)
        for changes in tiles:
            shipped.update(before | changes)
            times = [both(args, channels, head_dim)[i] for channels, head_dim in CASES.values()]
            label = " ".join(f"{name}={value}" for name, value in changes.items())
            table.add_row(way, label or "as shipped", *(f"{time:.3f}" for time in times))
        shipped.update(before)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="B")
    parser.add_argument("--tokens", type=int, default=4096, help="T")
    parser.add_argument("--width", type=int, default=4, help="W")
    parser.add_argument("--documents", type=int, default=0, help="tokens a document; 0: a row is a document")
    parser.add_argument("--sweep", action="store_true", help="time other tiles instead")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.short_conv needs a CUDA device")
    # The backward of one graph is timed many times.
    functorch_config.donated_buffer = False
    documents = f"documents of {args.documents}" if args.documents else "no documents"
    print(f"{torch.cuda.get_device_name()}: B={args.batch} T={args.tokens} W={args.width}, {documents}, bfloat16")
    Console().print(sweep(args) if args.sweep else compare(args))


if __name__ == "__main__":
    main()

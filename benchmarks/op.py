"""The operator, milliseconds and ratios side by side: ours and fla on a GPU, chunk and the plain loop on a CPU.

    python -m benchmarks.op                               on a GPU: n 1 to 3, plain and gated, 8 x 4,096, 1 x 65,536
    python -m benchmarks.op --minutes 5 --householders 3 --gates plain
    python -m benchmarks.op --dtype float32               on a GPU: our kernels beside the chunk backend
    python -m benchmarks.op --device cpu                  T=1024, n=2, H=4, K=V=64, B=1, one thread
    python -m benchmarks.op --device cpu --tokens 4096 --heads 8 --head-dim 128 --gated
    python -m benchmarks.op --device cpu --sweep          chunk rows R and segment sizes

On a GPU both are given queries and keys of unit length, in bfloat16 if not said otherwise. Medians of CUDA
events: forward, and forward + backward, as Python calls them, and forward + backward captured in a CUDA graph, which
leaves out the time the host needs to launch (short sequences wait for it, compiled training does not). fla is called
directly. Errors are the worst of o and all gradients against float64, ||x - ref|| / ||ref||, over 512
tokens. fla tunes its kernels at the first call of each kind, which takes minutes; what the time does not allow is left
out and said. On a CPU each time is the best of `--repeats`, taken in turn so that a busy machine slows both; with one
thread it is CPU time. The recurrent backend is the plain loop with plain autograd; chunk goes through the custom op.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.tables import columns
from torchtitan_deltaproduct.ops import gated_delta_product
from torchtitan_deltaproduct.ops.chunk import chunk_backward, chunk_forward

ROWS = (16, 24, 32, 48, 64, 96, 128)
SEGMENTS = (512, 1024, 2048, 4096, 2**30)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="T")
    parser.add_argument("--num-householder", type=int, default=2, help="n")
    parser.add_argument("--batch", type=int, default=1, help="B")
    parser.add_argument("--heads", type=int, default=4, help="H")
    parser.add_argument("--head-dim", type=int, help="K and V (128; on a CPU 64)")
    parser.add_argument("--gated", action="store_true", help="with a decay")
    dtypes = ("float32", "float64", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--householders", type=int, nargs="+", default=[1, 2, 3], help="n of the GPU table")
    parser.add_argument("--gates", nargs="+", choices=("plain", "gated"), default=["plain", "gated"])
    parser.add_argument("--shapes", nargs="+", default=["8x4096x8", "1x65536x6"], help="B x T x H of the GPU table")
    parser.add_argument("--minutes", type=float, default=9.5, help="after which no row of the GPU table is begun")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sweep", action="store_true", help="time chunk for several R and segment sizes instead")
    args = parser.parse_args()
    of_cpu, of_gpu = (
        ("tokens", "num_householder", "batch", "heads", "gated"),
        ("householders", "gates", "shapes", "minutes"),
    )
    for name in of_gpu if args.device == "cpu" or args.sweep else of_cpu:
        if getattr(args, name) != parser.get_default(name):
            parser.error(
                f"--{name.replace('_', '-')} is not read {'on a CPU' if name in of_gpu else 'for the GPU table'}"
            )
    args.head_dim = args.head_dim or (64 if args.device == "cpu" else 128)
    return args


def inputs(args: argparse.Namespace) -> list[torch.Tensor | None]:
    """q, k, v, g, beta."""
    torch.manual_seed(0)
    batch, length, heads, dim = args.batch, args.tokens, args.heads, args.head_dim
    options = {"dtype": getattr(torch, args.dtype), "device": args.device}
    rows = length * args.num_householder
    q, k, v = (torch.randn(batch, size, heads, dim, **options) for size in (length, rows, rows))
    g = -torch.rand(batch, length, heads, device=args.device) if args.gated else None
    beta = 2 * torch.rand(batch, rows, heads, device=args.device)
    return [q, k, v, g, beta]


def best(functions: list[Callable[[], object]], repeats: int, device: str) -> list[float]:
    """Best milliseconds of each function, taken in turn."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, seen in zip(functions, times, strict=True):
            start = clock()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                seen.append(1e3 * (clock() - start))
    return [min(seen) for seen in times]


def compare(args: argparse.Namespace) -> Table:
    tensors = inputs(args)
    leaves = [None if x is None else x.clone().requires_grad_() for x in tensors]
    do = torch.randn_like(tensors[2][:, : args.tokens])

    def forward(backend: str) -> torch.Tensor:
        with torch.no_grad():
            return call(tensors, backend)

    def both(backend: str) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(call(leaves, backend), [x for x in leaves if x is not None], do)

    def call(values: list[torch.Tensor | None], backend: str) -> torch.Tensor:
        return gated_delta_product(*values, args.num_householder, use_qk_l2norm=True, backend=backend)[0]

    difference = (forward("recurrent") - forward("chunk")).abs().max().item()
    caption = f"largest difference of the outputs: {difference:.1e}"
    table = Table(*columns("", "recurrent (ms)", "chunk (ms)", "ratio"), caption=caption)
    for name, function in (("forward", forward), ("forward + backward", both)):
        slow, fast = best([lambda f=function: f("recurrent"), lambda f=function: f("chunk")], args.repeats, args.device)
        table.add_row(name, f"{slow:.1f}", f"{fast:.1f}", f"{slow / fast:.1f}x")
    return table


@torch.no_grad()
def sweep(args: argparse.Namespace) -> Table:
    """Forward + backward of the chunk functions, without the custom op, by R (down) and segment size
    (across)."""
    q, k, v, g, beta = inputs(args)
    do = torch.randn_like(v[:, : args.tokens])
    options = {"scale": args.head_dim**-0.5, "use_qk_l2norm": True}

    def both(rows: int, segment: int) -> None:
        sizes = {"chunk_rows": rows, "segment_rows": segment}
        _, _, *saved = chunk_forward(q, k, v, g, beta, None, None, **options, **sizes)
        chunk_backward(do, None, q, k, v, g, beta, None, *saved, **options, **sizes)

    cases = [(rows, segment) for rows in ROWS for segment in SEGMENTS]
    times = best([lambda c=case: both(*c) for case in cases], args.repeats, args.device)
    caption = "chunk, forward + backward (ms); columns: B * H * rows of a segment"
    table = Table(*columns("R", *map(str, SEGMENTS[:-1]), "whole"), caption=caption)
    for i, rows in enumerate(ROWS):
        row = times[i * len(SEGMENTS) : (i + 1) * len(SEGMENTS)]
        table.add_row(str(rows), *(f"[bold]{x:.1f}[/]" if x == min(times) else f"{x:.1f}" for x in row))
    return table


def beside_fla(args: argparse.Namespace) -> Table:
    """Ours and fla (in float32, which fla refuses: chunk), forward and forward + backward, on a GPU."""
    peer, peer_op = ("fla", fla_op) if args.dtype == "bfloat16" else ("chunk", chunk_op)
    end = time.monotonic() + 60 * args.minutes
    times = (name for what in ("fwd", "fwd+bwd", "graph") for name in (f"{peer} {what}", "ours", "ratio"))
    table = Table(*columns("B x T x H", "n", "gate", *times, f"error {peer}", "ours"))
    table.title = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: ms, K = V = {args.head_dim}, {args.dtype}"
    )
    shapes = [tuple(int(x) for x in shape.split("x")) for shape in args.shapes]
    cases = [(s, n, gate) for s in shapes for gate in args.gates for n in args.householders]
    for number, (shape, n, gate) in enumerate(cases):
        if time.monotonic() > end:
            table.caption = f"{len(cases) - number} rows left out: the time was over (--minutes)"
            break
        tensors = unit_inputs(*shape, n, gate == "gated", args.head_dim, args.dtype)
        row = {name: times_of(op, tensors, n) for name, op in (("peer", peer_op), ("ours", our_op))}
        cells = []
        for theirs, ours in zip(row["peer"], row["ours"], strict=True):
            both = isinstance(theirs, float) and isinstance(ours, float)
            cells += [f"{x:.3f}" if isinstance(x, float) else x for x in (theirs, ours)]
            cells.append(f"{theirs / ours:.2f}x" if both else "-")
        small = unit_inputs(1, 512, shape[2], n, gate == "gated", args.head_dim, args.dtype)
        cells += [worst_error(peer_op, small, n), worst_error(our_op, small, n)]
        table.add_row("x".join(map(str, shape)), str(n), gate, *cells)
        print(shape, n, gate, *cells, flush=True)
        torch.cuda.empty_cache()
    return table


def unit_inputs(batch: int, length: int, heads: int, n: int, gated: bool, dim: int, dtype: str) -> list[Tensor | None]:
    """q, k, v, g, beta, with gradients."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(rows: int) -> Tensor:
        return torch.randn(batch, rows, heads, dim, device="cuda", generator=generator)

    q, k = (F.normalize(normal(rows), dim=-1).to(getattr(torch, dtype)) for rows in (length, length * n))
    beta = 2 * torch.rand(batch, length * n, heads, device="cuda", generator=generator)
    g = -0.2 * torch.rand(batch, length, heads, device="cuda", generator=generator) if gated else None
    tensors = [q, k, normal(length * n).to(q.dtype), g, beta]
    return [x if x is None else x.requires_grad_() for x in tensors]


def our_op(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, n: int) -> Tensor:
    return gated_delta_product(q, k, v, g, beta, n, unit_keys=True, backend="triton")[0]


def chunk_op(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, n: int) -> Tensor:
    return gated_delta_product(q, k, v, g, beta, n, unit_keys=True, backend="chunk")[0]


def fla_op(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, n: int) -> Tensor:
    from fla.ops.gated_delta_product import chunk_gated_delta_product

    return chunk_gated_delta_product(q, k, v, g, beta, n)[0]


def times_of(op: Callable[..., Tensor], tensors: list[Tensor | None], n: int) -> list[float | str]:
    """Median milliseconds of forward, of forward + backward, and of these as a CUDA graph, or why there is none."""
    from triton.testing import do_bench, do_bench_cudagraph

    leaves = [x for x in tensors if x is not None]
    do = torch.randn_like(tensors[0])

    def forward() -> None:
        with torch.no_grad():
            op(*tensors, n)

    def both() -> None:
        torch.autograd.grad(op(*tensors, n), leaves, do)

    measurements = (
        lambda: do_bench(forward, warmup=50, rep=200, return_mode="median"),
        lambda: do_bench(both, warmup=50, rep=200, return_mode="median"),
        lambda: do_bench_cudagraph(both, rep=100, return_mode="median"),
    )
    times: list[float | str] = []
    for measure in measurements:
        try:
            times.append(measure())
        except Exception as error:  # the table tells, and goes on
            times.append("refuses" if "640" in str(error) or isinstance(error, RuntimeError) else type(error).__name__)
    return times


def worst_error(op: Callable[..., Tensor], tensors: list[Tensor | None], n: int) -> str:
    """The largest relative error of o and the gradients against the float64 chunk backend."""
    exact = [x if x is None else x.detach().double().requires_grad_() for x in tensors]
    want = gated_delta_product(*exact, n, backend="chunk")[0]
    do = torch.randn_like(want)
    wants = [want, *torch.autograd.grad(want, [x for x in exact if x is not None], do)]
    try:
        got = op(*tensors, n)
        gots = [got, *torch.autograd.grad(got, [x for x in tensors if x is not None], do.to(got.dtype))]
    except RuntimeError:
        return "-"
    return f"{max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(gots, wants, strict=True)):.1e}"


def title(args: argparse.Namespace) -> str:
    gate = "decay" if args.gated else "no decay"
    return (
        f"T={args.tokens} n={args.num_householder} H={args.heads} K=V={args.head_dim} B={args.batch} {gate}, "
        f"{args.dtype} on {args.device}, {args.threads} thread(s)"
    )


def main() -> None:
    args = arguments()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    torch.set_num_threads(args.threads)
    if args.device == "cuda" and not args.sweep:
        Console(width=150).print(beside_fla(args))
        return
    # A line of its own: a table wraps its title.
    print(title(args))
    Console().print(sweep(args) if args.sweep else compare(args))


if __name__ == "__main__":
    main()

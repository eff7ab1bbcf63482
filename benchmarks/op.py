"""The operator's recurrent and chunk backends side by side: milliseconds and their ratio.

    python benchmarks/op.py                                # T=1024, n=2, H=4, K=V=64, B=1, one thread
    python benchmarks/op.py --tokens 4096 --heads 8 --head-dim 128 --gated
    python benchmarks/op.py --sweep                        # chunk rows R and segment sizes

Each time is the best of `--repeats`, the two backends taken in turn so that a busy machine slows both; with
one CPU thread it is CPU time, so that waiting for the core does not count. The recurrent backend is the plain
loop with plain autograd; chunk goes through the public function, custom op included.
"""

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

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
    parser.add_argument("--head-dim", type=int, default=64, help="K and V")
    parser.add_argument("--gated", action="store_true", help="with a decay")
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sweep", action="store_true", help="time chunk for several R and segment sizes instead")
    return parser.parse_args()


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
    table = Table(caption=f"largest difference of the outputs: {difference:.1e}")
    for column in ("", "recurrent (ms)", "chunk (ms)", "ratio"):
        table.add_column(column, justify="right")
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
    table = Table(caption="chunk, forward + backward (ms); columns: B * H * rows of a segment")
    table.add_column("R", justify="right")
    for segment in SEGMENTS:
        table.add_column("whole" if segment == SEGMENTS[-1] else str(segment), justify="right")
    for i, rows in enumerate(ROWS):
        row = times[i * len(SEGMENTS) : (i + 1) * len(SEGMENTS)]
        table.add_row(str(rows), *(f"[bold]{x:.1f}[/]" if x == min(times) else f"{x:.1f}" for x in row))
    return table


def title(args: argparse.Namespace) -> str:
    gate = "decay" if args.gated else "no decay"
    return (
        f"T={args.tokens} n={args.num_householder} H={args.heads} K=V={args.head_dim} B={args.batch} {gate}, "
        f"{args.dtype} on {args.device}, {args.threads} thread(s)"
    )


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    # A line of its own: a table wraps its title.
    print(title(args))
    Console().print(sweep(args) if args.sweep else compare(args))


if __name__ == "__main__":
    main()

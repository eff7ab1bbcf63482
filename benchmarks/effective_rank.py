"""Effective rank of many states against one NumPy SVD a state: microseconds a state, and ratios.

    python -m benchmarks.effective_rank                            # heads of 32, 64 and 128; one thread, then two
    python -m benchmarks.effective_rank --head-dims 128 --threads 2
    python -m benchmarks.effective_rank --device cuda              # states on the GPU, eigenvalues on the CPU

The first table is the function alone, `evaluation.effective_rank.singular_values` on float32 states of a random
recurrence, beside a Python loop of `np.linalg.svd(S)`, as scripts usually have it, the same with `compute_uv=False`,
which is all that is needed, and `torch.linalg.svdvals` of the whole batch. The second is the whole measurement at every
token of a small model: states by `effective_rank.states` and their ranks, beside decoding token by token with one
`np.linalg.svd(S)` for each token, layer and head. All of a row is measured in turn, each the best of `--repeats`; with
one thread in CPU time, so that waiting for a core does not count. NumPy has one thread throughout: a second made it
slower here.
"""

import argparse
import os
import subprocess
import sys

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.op import best
from benchmarks.tables import columns
from torchtitan_deltaproduct.evaluation.effective_rank.singular_values import effective_rank
from torchtitan_deltaproduct.evaluation.effective_rank.states import walk
from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM
from torchtitan_deltaproduct.models.decode import init_cache, step

TOKENS = 64
"""Of the second table."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[32, 64, 128], help="K = V")
    parser.add_argument("--states", type=int, default=256, help="of a batch")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu", help="of our side")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def recurrence(count: int, dim: int) -> torch.Tensor:
    """[count, dim, dim] float32: states of n_h = 1 after 4 dim tokens of random keys and values, beta in (0, 2)."""
    torch.manual_seed(0)
    state = torch.zeros(count, dim, dim)
    for _ in range(4 * dim):
        key = torch.nn.functional.normalize(torch.randn(count, 1, dim), dim=-1)
        error = torch.randn(count, 1, dim) - key @ state
        state = state + key.mT @ (2 * torch.rand(count, 1, 1) * error)
    return state


def numpy_rank(state: np.ndarray, vectors: bool) -> float:
    """What a script does with one state."""
    values = np.linalg.svd(state)[1] if vectors else np.linalg.svd(state, compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def torch_rank(states: torch.Tensor) -> torch.Tensor:
    values = torch.linalg.svdvals(states)
    return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()


def functions_table(args: argparse.Namespace) -> Table:
    names = ("np.linalg.svd(S)", "compute_uv=False", "torch svdvals")
    ratios = (f"ratio to {name.split('(')[0]}" for name in names)
    table = Table(*columns("K = V", *names, "ours", *ratios, "largest error"), title_justify="left")
    table.title = "microseconds a state"
    for dim in args.head_dims:
        states = recurrence(args.states, dim)
        arrays, there = list(states.numpy()), states.to(args.device)
        times = best(
            [
                lambda a=arrays: [numpy_rank(x, True) for x in a],
                lambda a=arrays: [numpy_rank(x, False) for x in a],
                lambda s=states: torch_rank(s),
                lambda s=there: effective_rank(s).cpu(),
            ],
            args.repeats,
            args.device,
        )
        exact = torch.tensor([numpy_rank(x.astype(np.float64), False) for x in arrays])
        error = (effective_rank(there).cpu() / exact - 1).abs().max()
        each = [1e3 * t / args.states for t in times]
        ratios = [f"{t / each[-1]:.1f}x" for t in each[:-1]]
        table.add_row(str(dim), *(f"{t:,.1f}" for t in each), *ratios, f"{error:.0e}")
    return table


def measurement_table(args: argparse.Namespace) -> Table:
    table = Table(*columns("K = V", "token by token, np.linalg.svd(S)", "ours", "ratio"), title_justify="left")
    table.title = f"microseconds a (token, layer, head), {TOKENS} tokens"
    for dim in args.head_dims:
        heads = max(1, 192 // dim)
        shape = {"hidden_size": heads * dim, "num_heads": heads, "head_dim": dim, "num_hidden_layers": 2}
        model = DeltaProductLM(DeltaProductArgs(vocab_size=1000, num_householder=2, allow_neg_eigval=True, **shape))
        model.init_weights()
        model.eval().requires_grad_(False)
        tokens = torch.randint(0, 1000, (1, TOKENS))
        there, moved = model, tokens.to(args.device)
        if args.device != "cpu":
            there = DeltaProductLM(model.args).to(args.device)
            there.load_state_dict(model.state_dict())

        def theirs(model=model, tokens=tokens) -> None:
            cache = init_cache(model, 1)
            for t in range(TOKENS):
                _, cache = step(model, tokens[:, t], cache)
                for layer in cache:
                    for state in layer.state[0].numpy():
                        numpy_rank(state, True)

        def ours(model=there, tokens=moved) -> None:
            walk(model, tokens, init_cache(model, 1), lambda g: [effective_rank(s).cpu() for s in g.states()])

        count = TOKENS * 2 * heads
        slow, fast = (1e3 * t / count for t in best([theirs, ours], args.repeats, args.device))
        table.add_row(str(dim), f"{slow:,.1f}", f"{fast:,.1f}", f"{slow / fast:.1f}x")
    return table


def main() -> None:
    args = arguments()
    if not args.here:
        # NumPy reads the number of threads when it is imported.
        for threads in args.threads:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "benchmarks.effective_rank", *sys.argv[1:], "--here"]
            subprocess.run(command, env=environment, check=True)
        return
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(f"{torch.get_num_threads()} thread(s), batch of {args.states} states, ours on {args.device}")
    console.print(functions_table(args))
    console.print(measurement_table(args))


if __name__ == "__main__":
    main()

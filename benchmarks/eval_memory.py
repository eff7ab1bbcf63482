"""Peak memory of `eval.length_extrapolation` against the length: it must not grow. A fresh process for each row.

    python -m benchmarks.eval_memory                          # 4k, 64k and 1M tokens; 3.5 minutes of one core
    python -m benchmarks.eval_memory --lengths 4096 32768

The model has the quick start's size (4 layers, hidden 192, 3 heads of 64, n_h = 2, vocabulary 4,096) and random
weights, the text is random tokens. Beside it: the same losses by one forward pass over the whole sequence, as far as
`--whole` allows. Peak memory is the largest resident set that the kernel saw of the process (ru_maxrss), programs and
libraries included. Speed is by CPU time above that of a single token, so that neither the start nor waiting for the
core counts; below two seconds it says nothing.

Exit code 1 if the longest sequence takes over 1.1 times the memory of the shortest.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

MOST_RATIO = 1.1
VOCAB = 4096


def make(folder: Path, tokens: int) -> None:
    """Writes folder/model and folder/data."""
    import torch

    from benchmarks.synthetic import write_random_set
    from torchtitan_deltaproduct.checkpoint.hf import write_hf
    from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM

    args = DeltaProductArgs(vocab_size=VOCAB, hidden_size=192, num_hidden_layers=4, num_heads=3, head_dim=64,
                            num_householder=2, intermediate_size=512, tie_word_embeddings=True)  # fmt: skip
    model = DeltaProductLM(args)
    model.init_weights()
    (folder / "model").mkdir()
    with torch.no_grad():
        write_hf(folder / "model", model.state_dict(), args, training={})
    write_random_set(folder / "data", tokens, VOCAB)


def whole(folder: Path, length: int) -> None:
    """The mean loss by one forward pass, all logits at once."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from torchtitan_deltaproduct.checkpoint.load import load_model
    from torchtitan_deltaproduct.data.shards.shards import TokenStream

    model, tokens = load_model(folder / "model").model, np.empty(length + 1, np.int64)
    TokenStream(folder / "data").read(-1, tokens)
    tokens = torch.from_numpy(tokens)
    with torch.no_grad():
        F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:])


def measure(*command: str) -> tuple[int, float]:
    """Runs a command; returns its peak resident set in bytes and its CPU time in seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{output.read()[-2000:]}")
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def segmented(folder: Path, length: int) -> tuple[int, float]:
    """`measure` of the eval on one sequence."""
    options = ["--length", str(length), "--sequences", "1", "--documents", "packed", "--device", "cpu"]
    inputs = [str(folder / "model"), "--data", str(folder / "data"), "--out", str(folder / f"out{length}")]
    return measure("-m", "eval.length_extrapolation", *inputs, *options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 65_536, 1_048_576], help="tokens")
    parser.add_argument("--whole", type=int, default=65_536, help="longest sequence for one forward pass")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--whole-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    # This process stays small: a child's peak would count the memory of the parent that it was forked from.
    if args.make:
        return make(Path(args.make[0]), int(args.make[1]))
    if args.whole_of:
        return whole(Path(args.whole_of[0]), int(args.whole_of[1]))
    table, first = Table(), None
    for column in ("tokens", "peak memory (MiB)", "ratio", "tokens/s", "one forward pass (MiB)"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure("-m", "benchmarks.eval_memory", "--make", name, str(max(args.lengths) + 1000))
        base, start = segmented(folder, 1)
        table.caption = f"one sequence, one CPU thread; {base / 2**20:,.0f} MiB for a single token"
        for length in sorted(args.lengths):
            peak, seconds = segmented(folder, length)
            first = first or peak
            speed = f"{length / (seconds - start):,.0f}" if seconds - start > 2 else ""
            beside = "not run"
            if length <= args.whole:
                other, _ = measure("-m", "benchmarks.eval_memory", "--whole-of", name, str(length))
                beside = f"{other / 2**20:,.0f}"
            table.add_row(f"{length:,}", f"{peak / 2**20:,.0f}", f"{peak / first:.3f}", speed, beside)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    return int(peak > MOST_RATIO * first)


if __name__ == "__main__":
    sys.exit(main())

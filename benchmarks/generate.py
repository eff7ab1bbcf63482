"""Generation at a short and at a long position: tokens a second, memory, and their ratios.

    python -m benchmarks.generate                                       positions 100, 10,000 and 100,000
    python -m benchmarks.generate --positions 100 1000000 --hidden 768 --layers 12 --heads 6 --head-dim 128

A random model (the quick start's size by default) reads a random text up to each position, in segments, and then
generates by sampling, as `eval.generate` does. Blocks of `--tokens` are taken at each position in turn, so that a
busy machine slows all of them, and the best block counts; with one CPU thread it is CPU time, so that waiting for the
core does not. Memory is the resident size of the process while it generates at a position (what is free is given back
to the system first), and the most while it read up to there: a segment's activations, and the text itself, a list of
Python integers of 36 bytes a token.
"""

import argparse
import ctypes
import gc
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.tables import columns
from torchtitan_deltaproduct.evaluation.generate.decoding import read_prompts
from torchtitan_deltaproduct.evaluation.generate.sampling import Sampling, choose, random_streams
from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM
from torchtitan_deltaproduct.models.counts import state_bytes
from torchtitan_deltaproduct.models.decode import step

MIB = 2**20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--positions", type=int, nargs="+", default=[100, 10_000, 100_000])
    add("--tokens", type=int, default=50, help="generated in a block")
    add("--blocks", type=int, default=8, help="at each position")
    add("--segment", type=int, default=2048, help="tokens of the text read at a time")
    add("--vocab", type=int, default=4096)
    add("--hidden", type=int, default=192)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=3)
    add("--head-dim", type=int, default=64)
    add("--num-householder", type=int, default=2)
    add("--threads", type=int, default=1)
    return parser.parse_args()


def build(options: argparse.Namespace) -> DeltaProductLM:
    """A model with its initial weights."""
    model = DeltaProductLM(
        DeltaProductArgs(
            vocab_size=options.vocab, hidden_size=options.hidden, num_hidden_layers=options.layers,
            num_heads=options.heads, head_dim=options.head_dim, num_householder=options.num_householder,
        )
    )  # fmt: skip
    model.init_weights()
    return model.eval().requires_grad_(False)


def memory(name: str) -> int:
    """Bytes of this process: VmRSS, its resident size, or VmHWM, the most of it since the peak was forgotten."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


class Place:
    """A sequence that has been read up to a position."""

    def __init__(self, model: DeltaProductLM, position: int, options: argparse.Namespace):
        text = torch.randint(options.vocab, (position,), generator=torch.Generator().manual_seed(0)).tolist()
        self.model, self.position = model, position
        self.sampling, self.streams = Sampling(temperature=1.0), random_streams([0])
        # The kernel forgets the peak.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        start = time.perf_counter()
        self.logits, self.cache = read_prompts(model, [text], options.segment)
        self.reading = time.perf_counter() - start
        self.clock = time.process_time if options.threads == 1 else time.perf_counter
        self.seconds: list[float] = []
        self.peak = memory("VmHWM")
        del text
        self.generate(options.tokens)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.resident = memory("VmRSS")
        self.seconds.clear()

    def generate(self, tokens: int) -> None:
        """One block."""
        start = self.clock()
        for _ in range(tokens):
            (token,) = choose(self.logits, self.sampling, self.streams)
            self.logits, self.cache = step(self.model, torch.tensor([token]), self.cache)
        self.seconds.append((self.clock() - start) / tokens)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    model = build(options)
    # What is allocated only once is so before anything is compared.
    read_prompts(model, [[0] * 2 * options.segment], options.segment)
    places = [Place(model, position, options) for position in options.positions]
    for _ in range(options.blocks):
        for place in places:
            place.generate(options.tokens)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters, n_h = {options.num_householder}, vocabulary {options.vocab:,}, float32, "
        f"{options.threads} thread(s); cache {state_bytes(model.args, bytes_per_value=4) / 1024:,.0f} KiB a sequence"
    )
    first = min(places[0].seconds)
    names = ("position", "ms a token", "tokens/s", "ratio", "resident (MiB)", "most, reading (MiB)", "reading (s)")
    table = Table(*columns(*names), box=None, pad_edge=False)
    for place in places:
        best = min(place.seconds)
        table.add_row(
            f"{place.position:,}", f"{1e3 * best:.2f}", f"{1 / best:,.0f}", f"{first / best:.2f}x",
            f"{place.resident / MIB:,.1f}", f"{place.peak / MIB:,.0f}", f"{place.reading:.1f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

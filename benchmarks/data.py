"""Shows that the loader is fast and that resuming costs the same anywhere.

    python -m benchmarks.data                  # about a minute on one core, no network
    python -m benchmarks.data --seq-len 4096
    python -m benchmarks.data --generated      # only 3, twenty seconds

1. Tokens a second of our prepared loader against torchtitan's own (HuggingFaceTextDataset in a
   ParallelAwareDataloader) on the same text, the Python standard library, with the same tokenizer, in turns
   in one process. Ours reads tokens that `prepare` made once; theirs tokenises while training. Our streaming
   loader, which tokenises as well, is beside them.
2. Milliseconds to resume at sample 10 and at sample 10^8, of a synthetic set that is large enough (its files
   are sparse).
3. Tokens a second of generated data, from the index to the batch the trainer gets, against one token at a time in
   Python (as the authors' program makes its files).

Exit code 1 if the loader is not 20 times as fast, if resuming far away takes more than twice as long, or if words over
S5 of 128 tokens come at less than 5 million tokens a second.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table

from benchmarks.synthetic import write_sparse_set
from benchmarks.tables import columns
from torchtitan_deltaproduct.config.job import Data
from torchtitan_deltaproduct.data import build_loader
from torchtitan_deltaproduct.data.generated.groups import parse_group
from torchtitan_deltaproduct.data.text.prepare import Settings, prepare
from torchtitan_deltaproduct.data.text.train_tokenizer import train_tokenizer

LEAST_RATIO, MOST_RESUME_RATIO, LEAST_WORDS = 20.0, 2.0, 5e6
ROUNDS, CORPUS_BYTES = 5, 6_000_000
SAMPLES = (10, 10**8)
# Settings, tokens of a row, rows of a batch; the first is the one that must reach LEAST_WORDS.
GENERATED = (
    ({"group": "S5"}, 128, 2048),
    ({"group": "S5"}, 128, 128),
    ({"group": "S3"}, 32, 128),
    ({"group": "S5_limit_to_3"}, 128, 2048),
    ({"group": "S5_4_tokens_s_token"}, 128, 2048),
    ({"group": "S6"}, 128, 2048),
    ({"group": "A4_x_Z5", "curriculum_start": 16, "curriculum_steps": 1000}, 128, 2048),
    ({"language": "parity"}, 40, 2048),
    ({"language": "modular_arithmetic"}, 40, 2048),
    ({"language": "modular_arithmetic_brackets"}, 40, 2048),
)


def make_data(root: Path) -> dict[str, str]:
    """JSON lines of standard library sources, a tokenizer trained on them, and the prepared set."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) + sorted(
        Path(sysconfig.get_path("stdlib")).glob("*/*.py")
    )
    size, folder = 0, root / "text"
    folder.mkdir()
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for path in sources:
            if "site-packages" in path.parts or size > CORPUS_BYTES:
                continue
            text = path.read_text(errors="ignore")
            size += len(text)
            file.write(json.dumps({"text": text}) + "\n")
    paths = {"text": str(folder), "tokenizer": str(root / "tokenizer"), "prepared": str(root / "prepared")}
    train_tokenizer([paths["text"]], 4096, paths["tokenizer"])
    prepare(Settings(paths["prepared"], paths["tokenizer"], [paths["text"]]))
    return paths


def torchtitan_loader(paths: dict[str, str], seq_len: int, batch_size: int):
    """torchtitan 0.2.2's own text loader on a local dataset, registered the way its docs say."""
    from datasets import load_dataset
    from torchtitan.components.dataloader import ParallelAwareDataloader
    from torchtitan.components.tokenizer import HuggingFaceTokenizer
    from torchtitan.hf_datasets import DatasetConfig
    from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataset

    DATASETS["benchmark"] = DatasetConfig(
        path=paths["text"],
        loader=lambda path: load_dataset(path, split="train"),
        sample_processor=lambda row: row["text"],
    )
    tokenizer = HuggingFaceTokenizer(paths["tokenizer"])
    dataset = HuggingFaceTextDataset("benchmark", None, tokenizer, seq_len, 0, 1, infinite=True)
    return ParallelAwareDataloader(dataset, dp_rank=0, dp_world_size=1, batch_size=batch_size)


def our_loader(data: Data, seq_len: int, batch_size: int, tokenizer: str = ""):
    return build_loader(
        data,
        seq_len=seq_len,
        local_batch_size=batch_size,
        global_batch_size=batch_size,
        tokenizer_path=tokenizer,
    )


def tokens_per_second(iterator, seconds: float) -> float:
    """Reads batches for about `seconds`; tokens of input in a second."""
    tokens, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        inputs, labels = next(iterator)
        assert inputs["input"].dtype == labels.dtype == torch.int64
        tokens += labels.numel()
    return tokens / elapsed


def compare_throughput(paths: dict[str, str], seq_len: int, batch_size: int, seconds: float) -> dict[str, float]:
    """Median tokens a second of each loader; they take turns, so that a busy machine slows all alike."""
    prepared = Data(paths=[paths["prepared"]])
    resetting = Data(paths=[paths["prepared"]], reset_state_at_documents=True)
    streaming = Data(kind="streaming", dataset=paths["text"])
    loaders = {
        "torchtitan 0.2.2 HuggingFaceTextDataset": torchtitan_loader(paths, seq_len, batch_size),
        "ours, prepared": our_loader(prepared, seq_len, batch_size),
        "ours, prepared, reset_state_at_documents": our_loader(resetting, seq_len, batch_size),
        "ours, streaming": our_loader(streaming, seq_len, batch_size, paths["tokenizer"]),
    }
    iterators = {name: iter(loader) for name, loader in loaders.items()}
    for iterator in iterators.values():
        next(iterator)
    rates = {name: [] for name in loaders}
    for _ in range(ROUNDS):
        for name, iterator in iterators.items():
            rates[name].append(tokens_per_second(iterator, seconds))
    return {name: statistics.median(values) for name, values in rates.items()}


def resume_seconds(folder: Path, seq_len: int, batch_size: int) -> dict[int, float]:
    """Median seconds from nothing to the first batch after `load_state_dict`, for each of `SAMPLES`."""
    data, found = Data(paths=[str(folder)]), {sample: [] for sample in SAMPLES}
    for _ in range(4 * ROUNDS):
        for sample in SAMPLES:
            start = time.perf_counter()
            loader = our_loader(data, seq_len, batch_size)
            loader.load_state_dict({**loader.state_dict(), "sample": sample})
            next(iter(loader))
            found[sample].append(time.perf_counter() - start)
    return {sample: statistics.median(values) for sample, values in found.items()}


def one_token_at_a_time(rows: int, seq_len: int) -> float:
    """Tokens a second of words over S5 made by a Python loop over the same table."""
    table = parse_group("S5").group.table.tolist()
    start = time.perf_counter()
    inputs, labels = [], []
    for _ in range(rows):
        word, state, products = random.choices(range(120), k=seq_len), 0, []
        for element in word:
            state = table[state][element]
            products.append(state)
        inputs.append(word)
        labels.append(products)
    torch.from_numpy(np.array(inputs)), torch.from_numpy(np.array(labels))
    return rows * seq_len / (time.perf_counter() - start)


def measure_generated(seconds: float) -> list[tuple[str, int, int, float, float]]:
    """Name, row length, batch size, median tokens a second, and the same over the Python loop."""
    measured = []
    for fields, seq_len, batch_size in GENERATED:
        kind = "group_word" if "group" in fields else "formal_language"
        iterator = iter(our_loader(Data(kind=kind, **fields), seq_len, batch_size))
        next(iterator)
        rates = [(tokens_per_second(iterator, seconds), one_token_at_a_time(100, 128)) for _ in range(ROUNDS)]
        rate, slow = (statistics.median(values) for values in zip(*rates, strict=True))
        name = fields.get("group") or fields["language"]
        if "curriculum_start" in fields:
            name += ", curriculum"
        measured.append((name, seq_len, batch_size, rate, rate / slow))
    return measured


def generated_passes(console: Console, seconds: float) -> bool:
    """Prints the table of generated data; whether its first line is fast enough."""
    table = Table(Column("data", no_wrap=True), *columns("tokens", "rows", "tokens/s", "ratio", no_wrap=True))
    table.title = "Generated batches of rows x tokens, one thread; ratio to a Python loop over tokens"
    measured = measure_generated(seconds)
    for name, seq_len, batch_size, rate, ratio in measured:
        table.add_row(name, str(seq_len), str(batch_size), f"{rate:,.0f}", f"{ratio:.1f}x")
    console.print(table)
    name, seq_len, _, rate, _ = measured[0]
    passed = rate >= LEAST_WORDS
    console.print(
        f"{'passed' if passed else 'FAILED'}: {name} of {seq_len} tokens, {rate / 1e6:.1f} million tokens/s "
        f"(at least {LEAST_WORDS / 1e6:.0f} million wanted)",
        soft_wrap=True,
    )
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seq-len", type=int, default=2048, help="window length in tokens")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of a batch")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement; there are five each")
    parser.add_argument("--generated", action="store_true", help="measure only generated data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    console = Console()
    if options.generated:
        return 0 if generated_passes(console, options.seconds / ROUNDS) else 1
    root = Path(tempfile.mkdtemp(prefix="benchmark-data-"))
    try:
        paths = make_data(root)
        rates = compare_throughput(paths, options.seq_len, options.batch_size, options.seconds)
        # A little more than 10^8 windows.
        tokens = (SAMPLES[-1] * options.seq_len) // 100 + 2 * options.seq_len
        sparse = write_sparse_set(root / "sparse", 100, tokens, documents=1000, vocab_size=4096)
        seconds = resume_seconds(sparse, options.seq_len, options.batch_size)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    base = next(iter(rates.values()))
    title = f"Loading batches of {options.batch_size} x {options.seq_len} tokens, one thread"
    table = Table("loader", *columns("tokens/s", "ratio"), title=title)
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / base:.1f}x")
    console.print(table)
    title = "Resuming in a set of 100 shards: from nothing to the first batch"
    table = Table(*columns("at sample", "milliseconds", "ratio"), title=title)
    for sample in SAMPLES:
        table.add_row(f"{sample:,}", f"{seconds[sample] * 1e3:.2f}", f"{seconds[sample] / seconds[10]:.2f}x")
    console.print(table)
    ratio, resume = rates["ours, prepared"] / base, seconds[SAMPLES[-1]] / seconds[SAMPLES[0]]
    passed = ratio >= LEAST_RATIO and resume <= MOST_RESUME_RATIO
    console.print(
        f"{'passed' if passed else 'FAILED'}: {ratio:.0f}x (at least {LEAST_RATIO:.0f}x wanted), "
        f"resuming far away takes {resume:.2f}x (at most {MOST_RESUME_RATIO:.0f}x wanted)",
        soft_wrap=True,
    )
    passed &= generated_passes(console, options.seconds / ROUNDS)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

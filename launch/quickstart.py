"""The quick start: corpus, tokenizer, token shards, training, a page of it, and what was learned, all offline.

    python -m launch.quickstart                        everything, in outputs/quickstart
    NPROC=2 python -m launch.quickstart                two ranks: FSDP2 over gloo
    python -m launch.quickstart --training.steps 50    further arguments go to the trainer

Each step is one documented command, printed before it runs. What is already there is reused.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np

from torchtitan_deltaproduct.config import load_config
from torchtitan_deltaproduct.data.shards.shards import TokenStream
from torchtitan_deltaproduct.devices import threads
from torchtitan_deltaproduct.errors import UserError, exit_on_user_error
from torchtitan_deltaproduct.history import read_metrics

CONFIG = Path("train_configs/quickstart.toml")
ROOT = Path("outputs/quickstart/data")
# Not the library but what is shipped around it; tests are missing on some systems and would make the data differ.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3", "config"}


def collect_corpus(corpus: Path) -> None:
    """Copies the standard library's sources to `corpus`, one file a document, unless that was done."""
    if corpus.is_dir():
        return
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(library.rglob("*.py")) if not LEFT_OUT & set(f.relative_to(library).parts)]
    partial = corpus.with_name("corpus.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for file in files:
        text = file.read_bytes()
        if text.strip():
            target = partial / file.relative_to(library)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text)
    partial.rename(corpus)
    print(f"corpus: {len(files)} files of {library}", flush=True)


def call(*command: str) -> None:
    """Prints and runs a command of this package; its failure ends the quick start with the same exit code."""
    shown = ["python" if part == sys.executable else part for part in command]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # Ctrl-C reached the command too: let it save what it has.
        process.wait()
        code = 130
    if code:
        sys.exit(code)


def unigram_loss(train: Path, validation: Path) -> float:
    """Held-out loss, in nats per token, of token frequencies counted on the training set (add-one smoothing)."""
    counts = []
    for folder in (train, validation):
        stream = TokenStream(folder)
        tokens = np.empty(stream.tokens, dtype=np.int64)
        stream.read(0, tokens)
        counts.append(np.bincount(tokens, minlength=stream.manifest.vocab_size))
    probability = (counts[0] + 1) / (counts[0] + 1).sum()
    return float(-(counts[1] * np.log(probability)).sum() / counts[1].sum())


def report(run: Path, baseline: float, seconds: float, config: Path) -> None:
    """Says what was learned, where it is, and what to type next."""
    records = read_metrics(run)
    steps = [r for r in records if "loss" in r]
    validations = [r for r in records if "validation_loss" in r]
    loss, bits, perplexity = (
        [r[f"validation_{name}"] for r in (validations[0], validations[-1])]
        for name in ("loss", "bits_per_byte", "perplexity")
    )
    speed = sorted(r["tokens_per_second"] for r in steps)[len(steps) // 2]
    more = 2 * steps[-1]["step"]
    lines = {
        "held-out loss": f"{loss[0]:.3f} -> {loss[1]:.3f} nats a token, {bits[0]:.3f} -> {bits[1]:.3f} bits a byte",
        "perplexity": f"{perplexity[0]:,.0f} -> {perplexity[1]:,.1f}; token frequencies alone give "
        f"{np.exp(baseline):,.0f}, {np.exp(baseline - loss[1]):.1f} times as much",
        "speed": f"{speed:,.0f} tokens a second; {steps[-1]['tokens']:,} tokens, this launch took {seconds:.0f} s",
        "where": f"{run}: metrics.jsonl, checkpoint/, config.json, tb/ (tensorboard --logdir {run}/tb)",
        "a page of it": f"{run}/report.html",
        "next": f"python -m torchtitan_deltaproduct.train --job.config_file {config} --training.steps {more} "
        f"--job.dump_folder {run.parent}/longer\n{'':16}python -m torchtitan_deltaproduct.plan {config}",
    }
    print("\n" + "\n".join(f"{name:16}{text}" for name, text in lines.items()))


def main() -> None:
    overrides = sys.argv[1:]
    python, ranks = sys.executable, os.environ.get("NPROC", "1")
    if not CONFIG.exists():
        raise UserError(f"{CONFIG} is not here: run the quick start from the top folder of the repository")
    load_config(["--job.config_file", str(CONFIG), "--data.paths", "x", "--validation.paths", "x", *overrides])
    package = "torchtitan_deltaproduct"
    ROOT.mkdir(parents=True, exist_ok=True)
    collect_corpus(ROOT / "corpus")
    call(python, "-m", f"{package}.data.train_tokenizer", str(ROOT / "corpus"), "--out", str(ROOT / "tokenizer"),
         "--vocab-size", "4096")  # fmt: skip
    call(python, "-m", f"{package}.data.prepare", str(ROOT / "stdlib"), "--input", str(ROOT / "corpus"), "--tokenizer",
         str(ROOT / "tokenizer"), "--validation-fraction", "0.03", "--split-by", "file")  # fmt: skip
    config = load_config(["--job.config_file", str(CONFIG), *overrides])
    # Two threads for one process; one each for several, or they fight over the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads(int(ranks))))
    # Waiting threads spin briefly, then sleep: endless spinning (the default) starves whoever else needs a core,
    # sleeping at once halves the speed of an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    begin = time.monotonic()
    call(python, "-m", "launch.torchrun", "--standalone", "--nproc_per_node", ranks, "-m", f"{package}.train",
         "--job.config_file", str(CONFIG), *overrides)  # fmt: skip
    baseline = unigram_loss(ROOT / "stdlib/train", ROOT / "stdlib/validation")
    seconds = time.monotonic() - begin
    # The page first: what was learned is the last that one reads.
    call(python, "-m", f"{package}.report", config.job.dump_folder)
    report(Path(config.job.dump_folder), baseline, seconds, CONFIG)


if __name__ == "__main__":
    exit_on_user_error(main)

"""A tiny run for tests: real text (a package of the standard library), a tiny tokenizer and model, the real trainer.

config = write_toml(tmp_path, make_data(tmp_path))
train(config, run, "--training.steps", "6")                       # in this process
launch(config, run, "--training.steps", "6", ranks=2)             # two ranks, gloo
losses = {r["step"]: r["loss"] for r in records(run) if "loss" in r}
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sysconfig
import time
import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from tests.processes import REPO as REPO
from tests.processes import Process, start
from torchtitan_deltaproduct.checkpoint.safe_dcp import SafeReader
from torchtitan_deltaproduct.config import load_config
from torchtitan_deltaproduct.data.text import prepare, train_tokenizer

TOML = """
[job]
dump_folder = "{folder}/run"
[model]
vocab_size = 320
hidden_size = 32
num_hidden_layers = 2
num_heads = 2
head_dim = 16
num_householder = 2
intermediate_size = 64
[data]
paths = ["{folder}/data/train"]
[training]
local_batch_size = 2
global_batch_size = 4
seq_len = 64
steps = 8
[optimizer]
lr = 1e-2
# With the usual 1e-8, gradients that are rounding noise move weights as far as true ones do.
eps = 1e-5
[lr_scheduler]
warmup_steps = 3
total_steps = 8
[validation]
enable = true
paths = ["{folder}/data/validation"]
local_batch_size = 2
freq = 4
steps = 6
[checkpoint]
interval = 2
[activation_checkpoint]
mode = "none"
[metrics]
log_freq = 1
"""

TIMINGS = {"time", "tokens_per_second", "mfu", "memory_gib", "data_seconds", "seconds", "failed_saves", "lost_records",
           "goodput"}  # fmt: skip
"""Fields of a record that describe the machine, not the training."""


def make_data(folder: Path) -> Path:
    """Prepares folder/data/{train,validation} from sources of the standard library."""
    corpus = str(Path(sysconfig.get_paths()["stdlib"], "asyncio"))
    tokenizer = str(folder / "tokenizer")
    assert not train_tokenizer.main([corpus, "--out", tokenizer, "--vocab-size", "320"])
    options = ["--validation-fraction", "0.2", "--split-by", "file", "--workers", "1"]
    assert not prepare.main([str(folder / "data"), "--input", corpus, "--tokenizer", tokenizer, *options])
    return folder


def write_toml(folder: Path, extra: str = "") -> Path:
    """Writes the toy TOML for data prepared in `folder`."""
    path = folder / "toy.toml"
    path.write_text(TOML.format(folder=folder) + extra)
    return path


def arguments(config: Path, run: Path, options: tuple[str, ...]) -> list[str]:
    return ["--job.config_file", str(config), "--job.dump_folder", str(run), *options]


def train(config: Path, run: Path, *options: str) -> None:
    """Trains in this process, as `python -m torchtitan_deltaproduct.train` would."""
    from torchtitan_deltaproduct.titan.run import run as run_training

    saved = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        os.environ.pop(name, None)
    try:
        run_training(load_config(arguments(config, run, options)))
    finally:
        os.environ.clear()
        os.environ.update(saved)


def launch(config: Path, run: Path, *options: str, ranks: int = 1, wait: bool = True) -> Process:
    """Starts the training command on some ranks, in a session of its own; output goes to run.log."""
    module = ["-m", "torchtitan_deltaproduct.train", *arguments(config, run, options)]
    process = start(module, f"{run}.log", ranks=ranks if ranks > 1 else 0)
    if wait:
        assert process.wait(timeout=300) == 0, log_of(run)[-4000:]
    return process


def kill(process: Process | subprocess.Popen) -> None:
    """SIGKILL to a process and all its descendants (torchrun's workers have sessions of their own)."""
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.2)


def descendants(pid: int) -> list[int]:
    """Children, their children, ... of a process."""
    listing = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in pairs if its_parent == parent]
    return found[1:]


def log_of(run: Path) -> str:
    return Path(f"{run}.log").read_text()


def wait_for(run: Path, text: str, seconds: float = 120) -> None:
    """Waits until the log contains `text`."""
    end = time.monotonic() + seconds
    while not (Path(f"{run}.log").exists() and text in log_of(run)):
        assert time.monotonic() < end, f"{text!r} did not appear:\n" + log_of(run)[-3000:]
        time.sleep(0.02)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learned(run: Path) -> dict:
    """What a run computed, without timings: {(step, name): value}."""
    skip = TIMINGS | {"step", "validation_seconds"}
    return {(r["step"], name): value for r in records(run) for name, value in r.items() if name not in skip}


def assert_close(run: Path, reference: Path) -> None:
    """Losses to 2e-5; gradient norms and perplexities, in which rounding differences grow, to 1e-3."""
    ours, theirs = learned(run), learned(reference)
    assert ours.keys() == theirs.keys() and len(theirs) > 40
    for key, value in theirs.items():
        tolerance = 1e-3 if key[1] in ("grad_norm", "validation_perplexity") else 2e-5
        assert math.isclose(ours[key], value, rel_tol=tolerance), (run.name, key, ours[key], value)


def weights(run: Path, step: int | str) -> dict:
    """Everything a checkpoint holds, flat: {"layers.0...weight": tensor, "train_state.step": 8, ...}."""
    folder = run / "checkpoint" / (step if isinstance(step, str) else f"step-{step}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = _load_state_dict_from_keys(storage_reader=SafeReader(str(folder)))

    def walk(tree: dict, prefix: str):
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(walk(state, ""))


def assert_same_weights(a: dict, b: dict) -> None:
    """Bitwise equality of two checkpoints, optimizer and counters included."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert same, f"{name} differs"

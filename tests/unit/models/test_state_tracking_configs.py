"""Every TOML in train_configs/state_tracking: what it runs, its parameter count, its vocabulary, its words."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from torchtitan_deltaproduct.config.check import Environment
from torchtitan_deltaproduct.config.load import load_config
from torchtitan_deltaproduct.data import build_loader
from torchtitan_deltaproduct.data.held_out import held_out_lengths
from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM, counts

FOLDER = Path(__file__).parents[3] / "train_configs" / "state_tracking"
FILES = sorted(FOLDER.glob("*.toml"))
RANGES = {True: "[-1, 1]", False: "[0, 1]"}


def test_every_experiment_has_its_file():
    languages = {f"{name}_n1_{sign}" for name in ("parity", "modular_arithmetic") for sign in ("pm1", "01")}
    assert {path.stem for path in FILES} == languages | {
        "laptop_S3", "S5_n4", "modular_arithmetic_brackets_n1_pm1"
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config(path):
    text = path.read_text()
    written, head = tomllib.loads(text), text.partition("[job]")[0]
    assert {f.name for f in fields(DeltaProductArgs)} - {"hidden_ratio", "op_backend"} <= set(written["model"])
    config = load_config(["--job.config_file", str(path)], Environment(world_size=1))
    args = DeltaProductArgs(**{f.name: getattr(config.model, f.name) for f in fields(DeltaProductArgs)})
    name, n, sign = re.fullmatch(r"(?:laptop_)?(\w+?)(?:_n(\d))?(?:_(pm1|01))?", path.stem).groups()
    n = n or "2"
    assert (config.data.group or config.data.language) == name
    assert args.num_householder == int(n) and args.allow_neg_eigval == (sign != "01")
    assert f"n_h = {n}" in head and f"eigenvalues in {RANGES[args.allow_neg_eigval]}" in head
    assert re.match(r"# (1 GPU|One CPU core)", head) and "Expected" in head
    assert config.job.dump_folder.endswith(f"/{path.stem}") and config.model.flavor == path.stem

    with torch.device("meta"):
        numel = sum(p.numel() for p in DeltaProductLM(args).parameters())
    assert int(re.search(r"Parameters: ([\d,]+)", head)[1].replace(",", "")) == numel == counts.total_parameters(args)

    training, validation = config.training, config.validation
    loader = build_loader(config.data, seq_len=training.seq_len, local_batch_size=2, global_batch_size=2)
    sets = held_out_lengths(
        config.data, seq_len=training.seq_len, lengths=validation.lengths, local_batch_size=2, samples=2
    )
    assert loader.source.vocab_size == args.vocab_size and max(sets) >= 4 * training.seq_len
    if stated := re.search(r"(?:Words|Rows): ([\d,]+) = ([\d,]+) steps of ([\d,]+)", head):
        total, steps, batch = (int(number.replace(",", "")) for number in stated.groups())
        assert (steps, batch) == (training.steps, training.global_batch_size) and total == steps * batch

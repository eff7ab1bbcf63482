"""Every TOML in train_configs/fineweb against the paper's table: architecture, counts, tokens, schedule.

The parameter count in a file's comment is compared with the model built on the meta device.
"""

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from torchtitan_deltaproduct import plan
from torchtitan_deltaproduct.config.check import Environment
from torchtitan_deltaproduct.config.load import load_config
from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM, counts

FOLDER = Path(__file__).parents[3] / "train_configs" / "fineweb"
FILES = sorted(FOLDER.glob("*.toml"))

# size, n_h: hidden, heads, MLP, millions of parameters in the paper's code, steps
TABLE = {
    ("213M", 1): (768, 8, 2048, 213.80, 36_240),
    ("213M", 2): (736, 6, 2048, 214.17, 36_240),
    ("213M", 3): (768, 4, 2048, 214.02, 36_240),
    ("340M", 1): (1024, 8, 2816, 341.59, 66_758),
    ("392M", 1): (1024, 12, 2816, 392.17, 66_758),
    ("392M", 2): (1024, 8, 2816, 392.42, 66_758),
    ("392M", 3): (1024, 6, 2816, 392.54, 66_758),
    ("805M", 1): (1536, 16, 4096, 805.38, 104_905),
    ("805M", 2): (1468, 12, 4096, 806.41, 104_905),
    ("805M", 3): (1536, 8, 4096, 805.97, 104_905),
}


def test_every_published_model_has_its_file():
    expected = {f"deltaproduct_{size}_n{n}_4k" for size, n in TABLE}
    expected |= {f"deltaproduct_213M_n{n}_{k}k" for n in (1, 2, 3) for k in (2, 8)}
    assert {path.stem for path in FILES} == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_published_config(path):
    size, n, context = re.fullmatch(r"deltaproduct_(\d+M)_n(\d)_(\d)k", path.stem).groups()
    hidden, heads, mlp, millions, steps = TABLE[size, int(n)]
    text = path.read_text()
    written = tomllib.loads(text)
    assert {f.name for f in fields(DeltaProductArgs)} <= set(written["model"]), "every field is spelled out"

    config = load_config(["--job.config_file", str(path)], Environment())
    args = DeltaProductArgs(**{f.name: getattr(config.model, f.name) for f in fields(DeltaProductArgs)})
    assert (args.hidden_size, args.num_heads, args.num_householder) == (hidden, heads, int(n))
    assert args.mlp_size == mlp == DeltaProductArgs(hidden_size=hidden).mlp_size
    assert round(counts.paper_parameters(args) / 1e6, 2) == millions
    with torch.device("meta"):
        model = DeltaProductLM(args)
    stated = re.findall(r"(?:Parameters|code|Tokens): (\d[\d,]*\d)", text.partition("[job]")[0])
    numbers = [int(number.replace(",", "")) for number in stated]
    numel = sum(p.numel() for p in model.parameters())
    tokens = steps * 524_288
    paper = [counts.paper_parameters(args)] if n != "1" else []
    assert numbers == [numel, *paper, tokens]
    assert numel == counts.total_parameters(args)

    training = config.training
    assert (training.steps, training.seq_len) == (steps, 1024 * int(context))
    assert training.global_batch_size * training.seq_len == 524_288
    assert training.global_batch_size % (8 * training.local_batch_size) == 0
    assert (config.optimizer.lr, config.optimizer.weight_decay, training.max_norm) == (3e-4, 0.01, 1.0)
    schedule = config.lr_scheduler
    assert (schedule.warmup_steps, schedule.decay_type, schedule.min_lr_factor) == (512, "cosine", 0.1)


def test_the_row_that_no_delta_product_has(capsys):
    """What the comment of the recipe says of its size, its tokens, its memory and its hours, is what `plan` says."""
    path = FOLDER.parent / "fineweb_edu/gated_deltaproduct_1300M_n2_4k.toml"
    comment = " ".join(path.read_text().partition("[job]")[0].replace("#", "").split())
    config = load_config(["--job.config_file", str(path)], Environment())
    args, training = config.model, config.training
    assert f"Parameters: {counts.total_parameters(args):,}." in comment
    tokens = training.global_batch_size * training.seq_len
    assert f"Tokens: {tokens * training.steps:,} = {training.steps:,} steps of {tokens:,};" in comment
    assert f"warm-up {config.lr_scheduler.warmup_steps:,} steps, 1 B tokens" in comment
    assert config.lr_scheduler.warmup_steps * tokens == pytest.approx(1e9, rel=1e-3)
    plan.main([str(path), "--world-size", "8", "--device", "H200"])
    printed = capsys.readouterr().out
    hours, memory = re.search(r"(\d+) GPU-hours", printed)[1], re.search(r"for work space: ([\d.]+) GB", printed)[1]
    assert f"not run: {hours} H200-hours and {round(float(memory))} GB a GPU" in comment

"""Accuracies of generated data against their definitions, on one rank and two, across a kill, and what is refused."""

import math

import numpy as np
import pytest
import torch

from tests.processes import run_distributed
from tests.toy import arguments, assert_same_weights, learned, records, train, weights
from torchtitan_deltaproduct.config import load_config
from torchtitan_deltaproduct.data.held_out import held_out_sequences
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM
from torchtitan_deltaproduct.titan.word_validator import count_right

TOML = """
[model]
vocab_size = {vocab}
hidden_size = 16
num_hidden_layers = 1
num_heads = 2
head_dim = 8
use_short_conv = false
intermediate_size = 16
[data]
{data}
[training]
local_batch_size = 4
global_batch_size = 8
seq_len = {length}
steps = 6
[optimizer]
lr = 1e-2
[lr_scheduler]
warmup_steps = 2
total_steps = 6
[validation]
enable = true
freq = 3
local_batch_size = 4
lengths = [{longer}]
samples = 10
[checkpoint]
interval = 2
[activation_checkpoint]
mode = "none"
[metrics]
log_freq = 1
"""
GROUP = 'kind = "group_word"\ngroup = "S3"\nseed = 5\ncurriculum_start = 3\ncurriculum_steps = 4'
PARITY = 'kind = "formal_language"\nlanguage = "parity"\nmin_length = 2\nmax_length = 8'


@pytest.fixture
def words(tmp_path):
    """A run on S3: 12 tokens in training, 24 besides in validation."""
    path = tmp_path / "words.toml"
    path.write_text(TOML.format(vocab=6, data=GROUP, length=12, longer=24))
    return path


@pytest.fixture
def parity(tmp_path):
    path = tmp_path / "parity.toml"
    path.write_text(TOML.format(vocab=3, data=PARITY, length=10, longer=20))
    return path


def test_counts_by_hand():
    labels = torch.tensor([[0, 1, 2, 0], [2, -100, 1, 1], [-100, -100, -100, -100], [1, 1, -100, -100]])
    answers = torch.tensor([[0, 1, 2, 0], [2, 0, 0, 1], [0, 0, 0, 0], [0, 1, 2, 2]])
    logits = torch.nn.functional.one_hot(answers, 3).float()
    #        scored 4 + 3 + 0 + 2, right 4 + 2 + 0 + 1, unbroken 4 + 1 + 0 + 0, rows 3, all right 1
    assert count_right(logits, labels).tolist() == [9, 7, 5, 3, 1]


def model_of(run, config, step) -> DeltaProductLM:
    names = DeltaProductArgs.__dataclass_fields__
    model = DeltaProductLM(DeltaProductArgs(**{name: getattr(config.model, name) for name in names}))
    saved = weights(run, step)
    model.load_state_dict({name: saved[name] for name in model.state_dict()})
    return model.eval()


def test_group_words_recomputed(words, tmp_path):
    run = tmp_path / "run"
    train(words, run)
    found = [r for r in records(run) if "validation_loss" in r]
    assert [r["step"] for r in found] == [0, 3, 6]
    config = load_config(arguments(words, run, ()))
    model = model_of(run, config, 6)
    for length, suffix in ((12, ""), (24, "_24")):
        data = held_out_sequences(config.data, seq_len=length, local_batch_size=10, samples=10)
        [(inputs, labels)] = list(data)
        with torch.no_grad():
            logits = model(inputs["input"])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        right = (logits.argmax(-1) == labels).numpy()
        prefix = [[row[: t + 1].all() for t in range(length)] for row in right]
        expected = {
            "tokens": 10 * length,
            "loss": loss.item(),
            "token_accuracy": right.mean(),
            "prefix_accuracy": np.mean(prefix),
            "sequence_accuracy": right.all(axis=1).mean(),
        }
        for name, value in expected.items():
            assert math.isclose(found[-1][f"validation_{name}{suffix}"], value, rel_tol=1e-5), (name, length)


def test_formal_language_recomputed(parity, tmp_path):
    run = tmp_path / "run"
    train(parity, run, "--training.steps", "2")
    last = [r for r in records(run) if "validation_loss" in r][-1]
    config = load_config(arguments(parity, run, ()))
    model = model_of(run, config, 2)
    for length, low, high, suffix in ((10, 2, 8, ""), (20, 8, 20, "_20")):
        [(inputs, labels)] = held_out_sequences(
            config.data, seq_len=length, local_batch_size=10, samples=10, min_length=low, max_length=high
        )
        sizes = (inputs["input"] < 2).sum(1)
        assert sizes.min() >= low and sizes.max() <= high
        with torch.no_grad():
            answers = model(inputs["input"]).argmax(-1)
        scored = labels != -100
        accuracy = (answers == labels)[scored].float().mean().item()
        assert math.isclose(last[f"validation_accuracy{suffix}"], accuracy, rel_tol=1e-6)
        assert math.isclose(last[f"validation_scaled_accuracy{suffix}"], 2 * accuracy - 1, abs_tol=1e-6)
        assert last[f"validation_tokens{suffix}"] == 10


def train_on_a_rank(rank: int, argv: list[str]) -> None:
    from torchtitan_deltaproduct.titan.run import run

    run(load_config(argv))


def test_two_ranks(words, tmp_path):
    """FSDP2 on two ranks: 10 rows are 2 batches a rank, the last ones padded."""
    train(words, tmp_path / "one")
    run_distributed(train_on_a_rank, 2, (arguments(words, tmp_path / "two", ()),))
    one, two = learned(tmp_path / "one"), learned(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, value in one.items():
        exact = "accuracy" in key[1] or "tokens" in key[1]
        tolerance = 0 if exact else 5e-4 if key[1] == "grad_norm" else 2e-5
        assert math.isclose(two[key], value, rel_tol=tolerance), (key, value, two[key])


def test_stopped_and_resumed(words, tmp_path):
    """The curriculum goes on where it was; a run that ends at step 4 and one that does not are the same."""
    train(words, tmp_path / "a")
    train(words, tmp_path / "b", "--training.steps", "4", "--validation.freq", "100")
    (tmp_path / "b/checkpoint/step-4/complete.json").unlink()  # as if killed while it was written
    train(words, tmp_path / "b")
    assert learned(tmp_path / "b") == learned(tmp_path / "a")
    assert_same_weights(weights(tmp_path / "a", 6), weights(tmp_path / "b", 6))
    with pytest.raises(ConfigError, match=r'data.group was "S3", is "D3"'):
        train(words, tmp_path / "b", "--data.group", "D3")
    with pytest.raises(ConfigError, match="words would have other lengths"):
        train(words, tmp_path / "b", "--data.curriculum_steps", "5")


def test_console_lines(words, parity, tmp_path, capsys):
    train(words, tmp_path / "run", "--training.steps", "1")
    train(parity, tmp_path / "parity", "--training.steps", "1")
    out = capsys.readouterr().out
    for text in ("group words: S3: 6 elements", "10 samples in 3 steps", "also at 24 tokens", "accuracy: token 0.",
                 "  prefix 0.", "; at 24: 0.", "(120 tokens in", "formal language: parity", "scaled "):  # fmt: skip
        assert text in out, (text, out)


def test_refused(words, parity, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"command line: data.group = 's3' is not the name.*nearest: 'S3'"):
        train(words, run, "--data.group", "s3")
    with pytest.raises(ConfigError, match=r"(?s)S4 \(command line\) has 24 tokens, but model.vocab_size = 6"):
        train(words, run, "--data.group", "S4")
    with pytest.raises(ConfigError, match="only read with kind"):
        train(words, run, "--validation.steps", "3")
    with pytest.raises(ConfigError, match="must all be at least 1"):
        train(words, run, "--validation.lengths", "0")
    with pytest.raises(ConfigError, match="max_length = 8 to L tokens: 7 is too short"):
        train(parity, run, "--validation.lengths", "7")
    assert not run.exists()

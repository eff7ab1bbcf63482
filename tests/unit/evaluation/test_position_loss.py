"""Losses by position: segments, chunks of logits and buckets against one long forward pass and plain loops."""

import math
import statistics as plain

import numpy as np
import pytest
import torch

from tests.unit.models.conftest import SETTINGS, small_model
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.evaluation.files import write_array, write_csv, write_json
from torchtitan_deltaproduct.evaluation.length_extrapolation.loss import POSITION, score
from torchtitan_deltaproduct.evaluation.length_extrapolation.results import (
    Result,
    Sums,
    beyond_training,
    mean_interval,
    parse_buckets,
    summarise,
    table,
)
from torchtitan_deltaproduct.evaluation.pieces import Measured, Pieces

HERE = "torchtitan_deltaproduct.evaluation"

LENGTH = 150


def tokens_of(rows=3, length=LENGTH, vocab=50):
    return np.random.default_rng(1).integers(0, vocab, (rows, length + 1))


def collect(model, tokens, **options):
    """All segments of `score`, one after the other."""
    losses, right, expected = [], [], 0
    for start, loss, correct in score(model, lambda a, b: tokens[:, a:b].copy(), tokens.shape[1] - 1, **options):
        assert start == expected and loss.shape == correct.shape
        expected += loss.shape[1]
        losses.append(loss)
        right.append(correct)
    assert loss.dtype == np.float32 and correct.dtype == bool
    return np.concatenate(losses, 1), np.concatenate(right, 1)


@pytest.mark.parametrize(("name", "n"), [("plain", 1), ("plain", 3), *((name, 2) for name in SETTINGS)])
def test_one_forward_pass_and_a_loop(name, n):
    """Every segment size gives the losses of one forward pass, each computed alone with its own logarithm."""
    model, tokens = small_model(torch.float64, **SETTINGS[name], num_householder=n), tokens_of()
    expected, right = np.empty((3, LENGTH)), np.empty((3, LENGTH), bool)
    for row, sequence in enumerate(tokens.tolist()):
        logits = model(torch.tensor([sequence[:-1]]))[0].tolist()
        for t, values in enumerate(logits):
            top = max(values)
            expected[row, t] = top + math.log(sum(math.exp(v - top) for v in values)) - values[sequence[t + 1]]
            right[row, t] = values.index(top) == sequence[t + 1]
    for segment in (1, 7, 64, 149, 1000):
        loss, correct = collect(model, tokens, segment=segment)
        assert loss == pytest.approx(expected, rel=1e-6) and np.array_equal(correct, right)


def test_float32_rounding():
    """In float32 the segments change a loss by rounding alone."""
    model, tokens = small_model(torch.float32, num_householder=2), tokens_of(2, 700)
    whole, _ = collect(model, tokens, segment=700)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[:, :-1]))
    labels = torch.from_numpy(tokens[:, 1:])
    forward = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").numpy()
    for segment in (1, 16, 100, 256):
        assert np.abs(collect(model, tokens, segment=segment)[0] - whole).max() < 2e-5
    assert np.abs(forward - whole).max() < 2e-5 < 1 < np.ptp(whole)


def test_logits_are_bounded(monkeypatch):
    model, tokens = small_model(torch.float32), tokens_of()
    whole, right = collect(model, tokens)
    most, head = [], model.head
    monkeypatch.setattr(model, "head", lambda x: most.append(head(x).numel()) or head(x))
    for limit, logits in ((4 * 50 * 7, 7 * 50), (1, 50), (1 << 30, 3 * LENGTH * 50)):
        most.clear()
        monkeypatch.setattr(f"{HERE}.length_extrapolation.loss.LOGIT_BYTES", limit)
        loss, correct = collect(model, tokens)
        assert max(most) == logits and np.abs(loss - whole).max() < 2e-5 and np.array_equal(correct, right)


def write_parts(folder, loss, correct, batch=2):
    """Raw results with given values."""
    sequences, length = loss.shape
    folder.mkdir()
    about = {"version": 1, "sequences": sequences, "length": length, "batch": batch, "segment": 8, "weights": "w",
             "dtype": "float32", "device": "cpu", "texts": "t"}  # fmt: skip
    pieces, positions = Pieces(folder, about, ".npy"), np.empty(loss.shape, POSITION)
    positions["loss"], positions["correct"] = loss, correct
    for first, last in pieces.all:
        write_array(pieces.path((first, last)), positions[first:last])
    return pieces


@pytest.fixture
def planted(tmp_path):
    rng = np.random.default_rng(3)
    loss = rng.gamma(2, 1, (5, 1000)).astype(np.float32) + rng.normal(0, 0.3, (5, 1)).astype(np.float32)
    correct = rng.random((5, 1000)) < 0.3
    return loss, correct, write_parts(tmp_path / "parts", loss, correct)


def test_buckets_by_hand(planted):
    """Means over sequences, standard errors and intervals with Python's own statistics."""
    loss, correct, parts = planted
    model, lasts = {"name": "m", "label": "m", "step": 1, "train_length": 100}, [1, 64, 65, 300, 1000]
    result = Result(Measured(model, {"name": "d", "kind": "packed"}, parts), lasts)
    firsts = [1, 2, 65, 66, 301]
    for bucket, first, last in zip(result.buckets, firsts, lasts, strict=True):
        assert (bucket["first"], bucket["last"], bucket["tokens"]) == (first, last, 5 * (last - first + 1))
        means = [plain.fmean(row[first - 1 : last].tolist()) for row in loss]
        error = plain.stdev(means) / math.sqrt(5)
        half = 2.776445 * error
        assert bucket["loss"] == pytest.approx(plain.fmean(means)) and bucket["loss_se"] == pytest.approx(error)
        assert bucket["loss_low"] == pytest.approx(max(bucket["loss"] - half, 0), abs=1e-5)
        assert bucket["perplexity_high"] == pytest.approx(math.exp(bucket["loss"] + half), rel=1e-5)
        shares = [plain.fmean(map(float, row[first - 1 : last])) for row in correct]
        assert bucket["accuracy"] == pytest.approx(plain.fmean(shares))
        assert bucket["accuracy_se"] == pytest.approx(plain.stdev(shares) / math.sqrt(5))
        assert 0 <= bucket["accuracy_low"] <= bucket["accuracy"] <= bucket["accuracy_high"] <= 1
        running = [plain.fmean(row[:last].tolist()) for row in loss]
        assert bucket["running_loss"] == pytest.approx(plain.fmean(running))
        assert bucket["running_loss_se"] == pytest.approx(plain.stdev(running) / math.sqrt(5))
        assert bucket["running_perplexity"] == pytest.approx(math.exp(plain.fmean(running)))
    change = [plain.fmean(row[500:].tolist()) - plain.fmean(row[50:100].tolist()) for row in loss]
    assert result.beyond["difference"] == pytest.approx(plain.fmean(change))
    assert result.beyond["difference_se"] == pytest.approx(plain.stdev(change) / math.sqrt(5))
    assert "positions 51 to 100" in result.verdict() and "501 to 1,000" in result.verdict()


def test_paired_difference():
    """Sequences that differ a lot, each by 0.1 more beyond training: the change is known exactly."""
    means = np.array([1.0, 3.0, 7.0])
    sums = Sums(np.array([0, 50, 100, 200, 400]), means[:, None] * [0, 50, 100, 200, 400], np.zeros((3, 5), int))
    sums.loss[:, 4] += 20
    found = beyond_training(sums, 100, 400)
    assert found["difference"] == pytest.approx(0.1) and found["difference_se"] == pytest.approx(0, abs=1e-12)
    assert found["beyond"]["loss_se"] > 1
    assert beyond_training(sums, 300, 400) is None and beyond_training(sums, None, 400) is None


def test_models_are_compared_sequence_by_sequence(tmp_path):
    """A second model that is 0.5 better everywhere, whatever the sequence: known exactly."""
    rng = np.random.default_rng(0)
    loss = (rng.random((4, 100)) + np.arange(4)[:, None]).astype(np.float32)
    right = np.zeros((4, 100), bool)
    measured = []
    for name, values in (("a", loss), ("b", loss - np.float32(0.5))):
        model = {"name": name, "label": name, "step": 1, "train_length": None}
        measured.append(Measured(model, {"name": "d", "kind": "long"}, write_parts(tmp_path / name, values, right)))
    first, second = summarise(measured, "10,100")
    assert not first.compared and all(math.isnan(bucket["minus_first"]) for bucket in first.buckets)
    for bucket in second.buckets:
        assert bucket["minus_first"] == pytest.approx(-0.5)
        assert bucket["minus_first_se"] < 1e-6 and bucket["loss_se"] > 0.5
    measured[1].pieces.about["texts"] = "of another tokenizer"
    assert not summarise(measured, "10,100")[1].compared


def test_few_sequences_have_no_interval():
    """One has no error, two have no interval that says anything; none reaches where no loss can be."""
    numbers = mean_interval(np.array([2.0]), "loss")
    assert numbers["loss"] == 2 and all(math.isnan(numbers[f"loss_{end}"]) for end in ("se", "low", "high"))
    numbers = mean_interval(np.array([2.0, 3.0]), "loss")
    assert numbers["loss_se"] == 0.5 and math.isnan(numbers["loss_low"]) and math.isnan(numbers["loss_high"])
    numbers = mean_interval(np.array([0.0, 0.1, 2.0]), "loss", least=0)
    assert numbers["loss_low"] == 0 and numbers["loss_high"] > 2


def test_buckets():
    assert parse_buckets("", 200) == [32, 48, 64, 96, 128, 192, 200]
    assert parse_buckets("", 128, (100, 128, 500)) == [32, 48, 64, 96, 100, 128] and parse_buckets("", 5) == [5]
    assert len(parse_buckets("", 1 << 20)) == 31
    assert parse_buckets("4", 1000) == [250, 500, 750, 1000] and parse_buckets("3", 10) == [3, 6, 10]
    assert parse_buckets("10,20", 30) == [10, 20, 30] and parse_buckets("10,30", 30) == [10, 30]
    assert parse_buckets("10,", 30) == [10, 30]
    for wrong in ("0", "x", "20,10", "5,5", "31", "10,31", "-4", "1.5", "10;20"):
        with pytest.raises(ConfigError, match="rising last positions"):
            parse_buckets(wrong, 30)


def test_what_is_not_finite_is_said(tmp_path, planted):
    """A state that blew up: nothing is hidden, and JSON stays JSON."""
    loss, correct, _ = planted
    loss[2, 700:] = np.nan
    loss[3, 900:] = np.inf
    parts = write_parts(tmp_path / "broken", loss, correct)
    model = {"name": "m", "label": "m", "step": 1, "train_length": 100}
    result = Result(Measured(model, {"name": "d", "kind": "packed"}, parts), [500, 700, 800, 1000])
    assert result.broken_from == 701
    assert [math.isfinite(bucket["loss"]) for bucket in result.buckets] == [True, True, False, False]
    write_json(tmp_path / "x.json", result.entry())
    write_csv(tmp_path / "x.csv", ["..."], (row.values() for row in result.rows()))
    assert "NaN" not in (tmp_path / "x.json").read_text() and "nan" not in (tmp_path / "x.csv").read_text()
    assert table([result]).row_count == 4

"""The horizon of a solved model, measured and predicted."""

import numpy as np
import pytest
import torch

from tests.unit.evaluation.test_state_tracking import small_model
from tests.unit.evaluation.words_toy import fake
from torchtitan_deltaproduct.data.generated.group_words import GroupWordSource
from torchtitan_deltaproduct.data.packing import IGNORE
from torchtitan_deltaproduct.evaluation.state_tracking.horizon import horizon, predicted_horizon
from torchtitan_deltaproduct.evaluation.state_tracking.problems import Counts, Problem, margins_of, model_reader
from torchtitan_deltaproduct.evaluation.state_tracking.results import Criterion, RunResult, by_setting


def losing(margin: float, grows: float, begin: float, length: int = 300) -> np.ndarray:
    """What is left of a margin that has lost `begin` e^((t / `grows`)^0.75) at position t."""
    left = margin - begin * np.exp((np.arange(1, length + 1) / grows) ** 0.75)
    left[0] = margin
    return left


@pytest.mark.parametrize(("margin", "grows", "begin"), [(12.0, 30.0, 0.1), (8.0, 40.0, 0.5), (12.0, 25.0, 0.01)])
def test_a_loss_that_grows_as_the_rule_says(margin, grows, begin):
    """margin = begin e^((t / grows)^0.75) at the horizon t."""
    expected, given = grows * np.log(margin / begin) ** (4 / 3), losing(margin, grows, begin)
    assert predicted_horizon(given) == pytest.approx(expected, rel=1e-6)
    # What comes after a third is lost does not matter, nor do positions without a label.
    third = int((given <= margin * 2 / 3).argmax()) + 1
    gaps = given.copy()
    gaps[third:], gaps[:2], gaps[2], gaps[20:24] = -100.0, np.inf, margin, np.inf
    assert predicted_horizon(gaps) == pytest.approx(expected, rel=1e-6) and expected > 1.2 * third


def test_from_a_quarter_of_the_way_to_a_third_of_the_margin():
    given = losing(12.0, 30.0, 0.1)
    expected, third = predicted_horizon(given), int((given <= 8.0).argmax()) + 1
    for position, counts in ((third // 4 - 1, False), (third // 4, True), (third - 1, True), (third + 1, False)):
        changed = given.copy()
        changed[position - 1] -= 0.01
        assert (predicted_horizon(changed) != expected) is counts, position


def test_where_there_is_nothing_to_predict():
    assert predicted_horizon(losing(12.0, 30.0, 0.1, 80)) is None, "a third is not lost yet"
    assert predicted_horizon(np.full(64, 12.0)) is None, "it loses nothing"
    assert predicted_horizon(np.r_[12.0, np.full(63, -5.0)]) is None, "it loses all at once"
    assert predicted_horizon(np.full(64, -1.0)) is None, "it never was right"
    assert predicted_horizon(np.full(64, np.inf)) is None, "nothing was asked"
    assert predicted_horizon(np.empty(0)) is None


def test_measured():
    assert horizon(np.array([10, 10, 6, 5, 4, 0]), 10) == 4 and horizon(np.array([10, 7]), 10) is None
    assert horizon(np.array([0, 0]), 10) == 0


def test_margins():
    logits = torch.tensor([[[3.0, 1.0, -2.0], [0.5, 2.0, 0.0], [1.0, 1.0, 1.0]]])
    labels = torch.tensor([[0, 2, IGNORE]])
    assert margins_of(logits, labels, labels != IGNORE).tolist() == [[2.0, -2.0, torch.inf]]


def test_the_least_margins_of_a_model():
    """One word, one position at a time, and the median; segments and batches change nothing."""
    model, source = small_model(), GroupWordSource("S3", 20, split="test")
    inputs, labels = source.batch(np.arange(11))
    logits = model(inputs["input"]).detach()
    margins = np.empty((11, 20))
    for word in range(11):
        for t in range(20):
            right = logits[word, t, labels[word, t]].item()
            margins[word, t] = right - max(x for i, x in enumerate(logits[word, t].tolist()) if i != labels[word, t])
    expected = [np.median([min(row[: t + 1]) for row in margins]) for t in range(20)]
    problem = Problem("S3", False, 8, 20, 1 / 6, (source,), 0)
    for rows, segment in ((11, 20), (4, 3)):
        counts = problem.count(model_reader(model), 11, rows, segment)
        np.testing.assert_allclose(counts.least_margin, expected, rtol=1e-5)


def test_it_is_in_the_record_and_comes_back():
    problem = Problem("S3", False, 32, 128, 1 / 6, (), 0)
    prefix = np.r_[np.full(100, 10), np.full(28, 2)]
    run = fake(problem, Counts(10, np.full(128, 10), prefix, prefix, losing(12.0, 20.0, 0.5, 128)))
    assert (run.horizon, run.predicted_horizon) == (100, pytest.approx(20 * np.log(24) ** (4 / 3), rel=1e-6))
    (setting,) = by_setting([run])
    record = setting.to_dict(Criterion())
    back = RunResult.from_dict(record["runs"][0], record)
    assert (back.horizon, back.predicted_horizon) == (100, pytest.approx(run.predicted_horizon, rel=1e-3))
    del record["runs"][0]["least_margin"]
    assert RunResult.from_dict(record["runs"][0], record).predicted_horizon is None, "of an earlier version"

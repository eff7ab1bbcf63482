"""Sampling against probabilities worked out by hand, and streams of random numbers a row."""

import math

import pytest
import torch

from torchtitan_deltaproduct.errors import CheckpointError, ConfigError
from torchtitan_deltaproduct.evaluation.generate.sampling import Sampling, choose, distribution, invert, random_streams

P = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)


def probabilities(**sampling):
    return distribution(P.log(), Sampling(**{"temperature": 1.0} | sampling))[0].tolist()


@pytest.mark.parametrize(("sampling", "expected"), [
    ({}, [0.5, 0.3, 0.15, 0.05]),
    ({"top_k": 2}, [0.625, 0.375, 0, 0]),
    ({"top_k": 1}, [1, 0, 0, 0]),
    ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
    # The token that crosses p is kept; one that reaches it exactly ends the set.
    ({"top_p": 0.51}, [0.625, 0.375, 0, 0]),
    ({"top_p": 0.8}, [0.625, 0.375, 0, 0]),
    ({"top_p": 0.81}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
    ({"top_p": 1e-13}, [1, 0, 0, 0]),
    # p is of the mass that top-k leaves: 0.526 and 0.842 before the third token.
    ({"top_k": 3, "top_p": 0.6}, [0.625, 0.375, 0, 0]),
    ({"top_k": 3, "top_p": 0.5}, [1, 0, 0, 0]),
    ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
    ({"temperature": 0.5, "top_p": 0.7}, [0.25 / 0.34, 0.09 / 0.34, 0, 0]),
])  # fmt: skip
def test_exact_probabilities(sampling, expected):
    assert probabilities(**sampling) == pytest.approx(expected, abs=1e-12)


def test_order_does_not_matter():
    order = torch.tensor([2, 0, 3, 1])
    for sampling in (Sampling(0.7, 3, 0.8), Sampling(1.3, 0, 0.6), Sampling(1.0, 2)):
        expected = distribution(P.log(), sampling)[:, order]
        assert torch.equal(distribution(P.log()[:, order], sampling) > 0, expected > 0)
        torch.testing.assert_close(distribution(P.log()[:, order], sampling), expected)


def test_tied_tokens():
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert (distribution(logits, Sampling(1.0, top_k=2)) > 0).tolist() == [[True, True, True, False]]
    assert (distribution(torch.zeros(1, 4), Sampling(1.0, top_p=0.5)) > 0).tolist() == [[True, True, False, False]]


def test_inverse_of_the_cumulative_distribution():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    for uniform, expected in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.99, 3), (1 - 2**-53, 3)):
        assert invert(p, torch.tensor([uniform], dtype=torch.float64)).item() == expected
    third = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    assert invert(third, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 2


def test_draws_follow_the_distribution():
    """Chi squared of 20,000 draws over 3 tokens: 13.8 is passed once in a thousand."""
    streams = random_streams(list(range(20_000)))
    drawn = torch.tensor(choose(P.log().expand(20_000, -1), Sampling(1.0, top_k=3), streams))
    counts = torch.bincount(drawn, minlength=4).double()
    expected = torch.tensor([0.5, 0.3, 0.15], dtype=torch.float64) / 0.95 * 20_000
    assert counts[3] == 0 and ((counts[:3] - expected) ** 2 / expected).sum() < 13.8


def test_a_row_has_its_own_stream():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together, sampling = random_streams([7, 8, 9]), Sampling(1.0)
    drawn = [choose(logits, sampling, together) for _ in range(5)]
    alone = random_streams([8])
    assert [choose(logits[1:2], sampling, alone)[0] for _ in range(5)] == [row[1] for row in drawn]
    assert len({tuple(row) for row in drawn}) > 1


def test_temperature_zero_is_greedy():
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert choose(logits, Sampling(), random_streams([1, 2])) == [1, 0]
    streams = random_streams([1])
    assert {choose(logits[1:], Sampling(temperature=1e-6), streams)[0] for _ in range(20)} == {0}


@pytest.mark.parametrize("wrong", [
    {"temperature": -0.1}, {"temperature": math.inf}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0},
    {"top_p": 1.1}, {"top_p": math.nan},
])  # fmt: skip
def test_what_is_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).replace("_", "-")):
        Sampling(**wrong)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(temperature):
    with pytest.raises(CheckpointError, match="not finite"):
        choose(torch.tensor([[0.0, math.nan]]), Sampling(temperature), random_streams([0]))


def test_the_smallest_temperatures():
    logits = torch.tensor([[1.0, 3.0, -2.0, 3.0], [900.0, -900.0, 0.0, 1.0]])
    for temperature in (1e-300, 1e-310, 5e-324):
        p = distribution(logits, Sampling(temperature))
        assert torch.equal(p, torch.tensor([[0, 0.5, 0, 0.5], [1, 0, 0, 0]], dtype=torch.float64))

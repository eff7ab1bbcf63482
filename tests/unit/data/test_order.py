"""The sampling order: bijective, the same however it is cut, exact in its shares."""

from itertools import pairwise

import numpy as np
import pytest

from torchtitan_deltaproduct.data.shards.order import PERIOD, Order, Permutation, quotas
from torchtitan_deltaproduct.errors import ConfigError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 100, 257, 1024, 99_991, 200_000])
def test_permutation_is_a_bijection(size):
    image = Permutation(size, 3, "key")(np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permutation_of_a_size_beyond_memory():
    size, points = 10**15 + 37, np.arange(0, 10**15, 10**11)
    image = Permutation(size, 1)(points)
    assert image.min() >= 0 and image.max() < size and len(np.unique(image)) == len(points)
    assert abs(image.mean() / size - 0.5) < 0.02


def test_permutation_looks_random_and_depends_on_its_key():
    size = 50_000
    one, other = (Permutation(size, key)(np.arange(size)) for key in (1, 2))
    # A random permutation has one fixed point on average, and as many agreements with another.
    assert (one == np.arange(size)).sum() < 10 and (one == other).sum() < 10
    assert abs(np.corrcoef(np.arange(size), one)[0, 1]) < 0.02
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.02
    # Neighbours are spread evenly: the share of ascents is one half.
    assert abs((np.diff(one) > 0).mean() - 0.5) < 0.01
    blocks = np.histogram2d(np.arange(size), one, bins=20)[0]
    assert ((blocks - size / 400) ** 2 / (size / 400)).sum() < 500  # chi-square, 361 degrees of freedom


def test_pinned_values():
    """The order of published runs must not change with a release."""
    assert Permutation(1000, 0)(np.arange(5)).tolist() == [496, 739, 461, 213, 277]
    source, window = Order((100, 30), (0.7, 0.3), seed=5, shuffle=True)(np.array([0, 1, 2, 10**9]))
    assert (source.tolist(), window.tolist()) == ([0, 1, 0, 0], [54, 24, 65, 45])


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_visits_every_window_once_in_another_order(shuffle):
    order = Order((101,), (1.0,), seed=0, shuffle=shuffle)
    epochs = [order(np.arange(101 * e, 101 * (e + 1)))[1] for e in (0, 1, 10**7)]
    for windows in epochs:
        assert np.array_equal(np.sort(windows), np.arange(101))
    assert all(np.array_equal(a, b) != shuffle for a, b in pairwise(epochs))


def test_a_sample_does_not_depend_on_its_neighbours():
    order = Order((57, 13, 200), (0.2, 0.5, 0.3), seed=9, shuffle=True)
    samples = np.concatenate([np.arange(500), np.arange(10**12, 10**12 + 500)])
    together = np.stack(order(samples))
    alone = np.stack([np.stack(order(np.array([s])))[:, 0] for s in samples], axis=1)
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (3, 1), (0.5, 0.25, 0.25), (1, 1, 1), (0.123, 0.877)])
def test_decimal_weights_are_exact_and_even(weights):
    order = Order((1000,) * len(weights), weights, seed=0, shuffle=True)
    period, shares = len(order.source), np.array(weights) / sum(weights)
    assert period <= 1000
    assert np.allclose(order.quotas / period, shares, rtol=0, atol=1e-15)
    source, _ = order(np.arange(7 * period))
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    # After any number of samples each source is within a few samples of its share.
    assert np.abs(counts - np.arange(1, 7 * period + 1)[:, None] * shares).max() <= len(weights)
    assert np.array_equal(counts[-1], 7 * order.quotas)


def test_other_weights_are_exact_to_the_period():
    weights = (np.pi, np.e, 1e-3)
    counts = quotas(weights)
    assert sum(counts) == PERIOD and min(counts) >= 1
    assert np.abs(np.array(counts) / PERIOD - np.array(weights) / sum(weights)).max() < 1 / PERIOD


def test_each_source_of_a_mixture_has_its_own_epochs():
    order = Order((50, 10), (0.5, 0.5), seed=4, shuffle=True)
    source, window = order(np.arange(100))
    assert np.array_equal(np.sort(window[source == 0]), np.arange(50))
    assert np.array_equal(np.sort(window[source == 1]), np.repeat(np.arange(10), 5))
    assert order.epochs(100) == [1.0, 5.0]
    assert order.epochs(101)[0] + order.epochs(101)[1] == pytest.approx(6 + 1 / 50)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, 1e-9)])
def test_weights_that_cannot_be_kept_are_refused(weights):
    with pytest.raises(ConfigError, match="data.weights"):
        quotas(weights)

"""Planted singular values, precision against float64 SVDs, and matrices with repeated and zero eigenvalues."""

import math

import pytest
import torch

from torchtitan_deltaproduct.evaluation.effective_rank.singular_values import effective_rank
from torchtitan_deltaproduct.evaluation.effective_rank.singular_values import singular_values as values_of


def planted(values, shape, count, dtype=torch.float32):
    """[count, *shape] matrices with the given singular values and random directions."""
    rows, cols = shape
    small = len(values)
    left = torch.linalg.qr(torch.randn(count, rows, small, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(count, cols, small, dtype=torch.float64)).Q
    return (left * torch.tensor(values, dtype=torch.float64) @ right.mT).to(dtype)


def rank_of(values):
    total = sum(values)
    return math.exp(-sum(v / total * math.log(v / total) for v in values if v))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(64, 64), (16, 24), (24, 16), (7, 5), (33, 50), (128, 128), (3, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["equal", "geometric", "one", "few"])
def test_planted_ranks(shape, kind):
    small = min(shape)
    values = {
        "equal": [3.0] * small,
        "geometric": [2.0**-i for i in range(small)],
        "one": [5.0],
        "few": [4.0, 2.0, 1.0, 1.0, 0.5][:small],
    }[kind]
    found = effective_rank(planted(values, shape, 37))
    assert found.dtype == torch.float64 and found.shape == (37,)
    # float32 entries are themselves off by 6e-8.
    torch.testing.assert_close(found, torch.full((37,), rank_of(values), dtype=torch.float64), rtol=2e-5, atol=0)
    doubles = effective_rank(planted(values, shape, 37, torch.float64))
    torch.testing.assert_close(doubles, torch.full_like(doubles, rank_of(values)), rtol=5e-6, atol=0)


def test_zero_rank_one_and_not_finite():
    states = torch.randn(40, 3, 12, 8)
    states[1] = 0
    states[5, 2] = torch.randn(12, 1) @ torch.randn(1, 8)
    states[7, 0, 3, 4], states[7, 1, 0, 0] = torch.nan, torch.inf
    found = effective_rank(states)
    assert (found[1] == 0).all() and found[5, 2] == pytest.approx(1, abs=1e-6)
    assert found[7, :2].isnan().all() and found.isnan().sum() == 2
    exact = values_by_svd(states.nan_to_num(0, 0, 0))
    torch.testing.assert_close(found[8:], rank_by_svd(exact)[8:], rtol=1e-6, atol=0)


def values_by_svd(states):
    return torch.linalg.svdvals(states.double())


def rank_by_svd(values):
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_values_of_any_scale(scale):
    states = torch.randn(20, 30, 17) * torch.logspace(0, -6, 17)
    found = values_of(states * scale)
    exact = values_by_svd(states * scale)
    assert (found.diff(dim=-1) <= 0).all()
    assert ((found - exact).abs() / exact[:, :1]).max() < 1e-8
    torch.testing.assert_close(effective_rank(states * scale), rank_by_svd(exact), rtol=1e-6, atol=0)
    huge = values_of(states.double() * 1e200)
    assert ((huge / 1e200 - values_by_svd(states)).abs().max()) < 1e-7


@pytest.mark.parametrize("decades", [4, 8, 12])
def test_squaring_costs_nothing_that_shows(decades):
    """Spectra that fall far below what float64 squares resolve: the rank is that of a float64 SVD to 1e-4."""
    states = planted(torch.logspace(0, -decades, 64).tolist(), (64, 64), 16, torch.float64)
    torch.testing.assert_close(effective_rank(states), rank_by_svd(values_by_svd(states)), rtol=1e-4, atol=0)
    noise = planted([1.0] + [1e-9] * 127, (128, 128), 16, torch.float64)
    torch.testing.assert_close(effective_rank(noise), rank_by_svd(values_by_svd(noise)), rtol=1e-5, atol=0)


def test_structured_matrices():
    """Whole numbers, many of them 0: repeated, zero and uncoupled eigenvalues, 64 of a kind together."""
    for _ in range(60):
        cols = int(torch.randint(1, 10, ()))
        states = torch.randint(-2, 3, (64, cols + int(torch.randint(0, 3, ())), cols)).float()
        states *= (torch.rand(64, 1, cols) < 0.6) * (torch.rand(64, 1, 1) < 0.9)
        squares, exact = values_of(states).square(), values_by_svd(states).square()
        assert (squares - exact).abs().max() < 1e-13 * (1 + exact.max())
    same = torch.eye(9).expand(20, 9, 9)
    torch.testing.assert_close(effective_rank(same), torch.full((20,), 9.0, dtype=torch.float64))


def test_layouts_and_dtypes():
    states = torch.randn(6, 2, 3, 10, 14)
    whole = effective_rank(states)
    assert whole.shape == (6, 2, 3)
    one = torch.stack([effective_rank(state[None])[0] for state in states.flatten(0, 2)]).view(6, 2, 3)
    torch.testing.assert_close(whole, one, rtol=1e-12, atol=0)
    torch.testing.assert_close(effective_rank(states.mT), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(effective_rank(states[::2, :, 1:]), whole[::2, :, 1:], rtol=1e-12, atol=0)
    narrow = states.bfloat16()
    torch.testing.assert_close(effective_rank(narrow), effective_rank(narrow.float()), rtol=0, atol=0)
    assert effective_rank(states[:0]).shape == (0, 2, 3)
    assert effective_rank(states[0, 0, 0]).shape == ()


def test_a_core_a_matrix_leaves_torch_its_threads(monkeypatch):
    """They are cut in parts, four a core."""
    before, seen = torch.get_num_threads(), []
    original = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda part: seen.append(torch.get_num_threads()) or original(part))
    torch.set_num_threads(2)
    try:
        effective_rank(torch.randn(9, 4, 4))
        assert len(seen) == 8 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

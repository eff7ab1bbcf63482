"""Eigenvalues of transitions against full matrices; counts against NumPy's histograms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.unit.models.conftest import small_model
from torchtitan_deltaproduct.evaluation.effective_rank.states import walk
from torchtitan_deltaproduct.evaluation.effective_rank.transitions import (
    BETA_BINS,
    MODULUS_BINS,
    PLANE_BINS,
    Tally,
    histogram,
    transition_eigenvalues,
)
from torchtitan_deltaproduct.models.decode import init_cache


def full_transition(k, beta, g=None):
    """[K, K] of one token."""
    matrix = torch.eye(k.shape[1], dtype=torch.float64)
    for key, strength in zip(k, beta, strict=True):
        matrix = (torch.eye(len(key), dtype=torch.float64) - strength * torch.outer(key, key)) @ matrix
    return matrix if g is None else matrix * g.exp()


def distance(found, expected):
    """Largest distance of two sets of complex numbers, each matched with its nearest that is left."""
    left, worst = list(expected), 0.0
    for value in found:
        gaps = [abs(value - other) for other in left]
        worst = max(worst, min(gaps))
        left.pop(int(np.argmin(gaps)))
    return worst


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_against_full_matrices(n, gated):
    torch.manual_seed(n)
    k = F.normalize(torch.randn(40, n, 9, dtype=torch.float64), dim=-1)
    beta = 2 * torch.rand(40, n, dtype=torch.float64)
    g = -torch.rand(40, dtype=torch.float64) if gated else None
    values = transition_eigenvalues(k, beta, g)
    assert values.shape == (40, n) and values.dtype == torch.complex128
    for i in range(40):
        rest = 1.0 if g is None else float(g[i].exp())
        exact = torch.linalg.eigvals(full_transition(k[i], beta[i], None if g is None else g[i]))
        assert distance(exact.tolist(), [*values[i].tolist(), *[rest] * (9 - n)]) < 1e-6
    assert values.abs().max() <= 1 + 1e-9
    if n == 1:
        assert (values.imag == 0).all()


def test_a_rotation():
    """Two reflections whose keys are 30 degrees apart rotate their plane by 60."""
    angle = np.pi / 6
    k = torch.tensor([[1, 0, 0], [np.cos(angle), np.sin(angle), 0]], dtype=torch.float64)
    values = transition_eigenvalues(k, torch.tensor([2.0, 2.0]))
    assert distance(values.tolist(), [np.exp(2j * angle), np.exp(-2j * angle)]) < 1e-12


def test_histogram():
    values = torch.rand(500, 2, 3, dtype=torch.float64) * 2
    values[0, 0, 0], values[1, 0, 0], values[2, 0, 0], values[3, 0, 0] = 0, 2, torch.nan, 2.5
    found = histogram(values, 40, 0, 2)
    assert found.shape == (2, 3, 40) and found[1].sum() == 1500 and found[0, 0].sum() == 499
    for h in range(2):
        for j in range(3):
            column = values[:, h, j].numpy()
            expected = np.histogram(np.minimum(column[np.isfinite(column)], 2), 40, (0, 2))[0]
            assert found[h, j].tolist() == expected.tolist()
    assert histogram(values[:0], 5, 0, 1).sum() == 0


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("negative", [False, True])
def test_tally(gated, negative):
    model = small_model(num_householder=2, use_forget_gate=gated, allow_neg_eigval=negative)
    tokens, top = torch.randint(0, 50, (3, 30)), 2.0 if negative else 1.0
    tally, seen = Tally.empty(model.args), []

    def look(glimpse):
        seen.append(glimpse)
        tally.add(glimpse, top)

    cache = walk(model, tokens[:, :13], init_cache(model, 3), look, every=4)
    walk(model, tokens[:, 13:], cache, look, every=4, offset=1)
    assert tally.tokens.tolist() == [90, 90] and tally.plane.sum() == 2 * 3 * 2 * 3 * 7
    for layer in range(2):
        beta = torch.cat([glimpse.beta for glimpse in seen[layer::2]], 1).view(3, 30, 2, 3)
        for h in range(3):
            for j in range(2):
                own = beta[:, :, j, h].flatten().numpy()
                assert tally.beta[layer, h, j].tolist() == np.histogram(own, BETA_BINS, (0, top))[0].tolist()
                assert tally.beta_sum[layer, h, j] == pytest.approx(own.sum(), rel=1e-12)
        values = []
        for glimpse in seen[layer::2]:
            k, b = glimpse.chosen_rows(glimpse.k), glimpse.chosen_rows(glimpse.beta)
            for row in range(3):
                for p in range(glimpse.positions):
                    g = None if glimpse.g is None else glimpse.chosen_tokens(glimpse.g)[row, p, 1]
                    matrix = full_transition(k[row, p, :, 1], b[row, p, :, 1], g)
                    rest = 1.0 if g is None else float(g.exp())
                    found = sorted(torch.linalg.eigvals(matrix).tolist(), key=lambda z: -abs(z - rest))
                    values += found[:2]
        values = np.array(values)
        plane = np.histogram2d(values.real, values.imag, PLANE_BINS, ((-1, 1), (-1, 1)))[0]
        assert np.abs(tally.plane[layer, 1] - plane).sum() <= 2
        assert np.abs(tally.modulus[layer, 1] - np.histogram(abs(values), MODULUS_BINS, (0, 1))[0]).sum() <= 2
        assert tally.rotating[layer, 1] == (abs(values.imag) > 1e-6).sum()
        assert tally.negative[layer, 1] == (values.real < 0).sum()

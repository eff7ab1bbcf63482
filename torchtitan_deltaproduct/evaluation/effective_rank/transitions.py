"""What a layer's tokens do to its state: histograms of beta and of the eigenvalues of the transition.

The n micro-steps of a token multiply the state by M = e^g (I - b_n k_n k_n^T) ... (I - b_1 k_1 k_1^T) = e^g (I - K^T W)
with the keys as rows of K [n, K] and W = (I + A)^-1 diag(b) K, A_ij = b_i k_i.k_j below the diagonal. M differs from
e^g I on n dimensions at most: e^g times 1 - the eigenvalues of the n x n matrix W K^T are those of M that are not e^g
(arXiv 2502.10297). With n = 1 they are real; with n >= 2 they may be complex: the transition rotates.

    values = transition_eigenvalues(k, beta, g)         # [..., n] complex
    tally = Tally.empty(model.args); tally.add(glimpse)
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchtitan_deltaproduct.models.args import DeltaProductArgs

from .states import Glimpse

BETA_BINS, PLANE_BINS, MODULUS_BINS = 40, 65, 50
"""beta: over [0, 2] or [0, 1]; real and imaginary part: [-1, 1], 0 in a middle; moduli: [0, 1]."""
REAL = 1e-6
"""An eigenvalue is complex if its imaginary part is larger."""


def transition_eigenvalues(k: Tensor, beta: Tensor, g: Tensor | None = None) -> Tensor:
    """The n eigenvalues of a token's transition that differ from e^g: [..., n] complex128, on the CPU, in no order.

    Of keys k [..., n, K] as the operator uses them (normalised), beta [..., n] and the log decay g [...], or None.
    """
    # Thousands of matrices of two or three rows: LAPACK is done before a GPU has started.
    k, beta = k.double().cpu(), beta.double().cpu()
    gram = k @ k.mT
    lower = beta.unsqueeze(-1) * gram.tril(-1)
    small = torch.linalg.solve_triangular(lower, beta.unsqueeze(-1) * gram, upper=False, unitriangular=True)
    values = 1 - torch.linalg.eigvals(small)
    return values if g is None else values * g.double().cpu().exp().unsqueeze(-1)


@dataclass
class Tally:
    """Counts over tokens; L layers, H heads, n Householders. All tokens, but for eigenvalues the chosen ones alone."""

    beta: np.ndarray
    """[L, H, n, BETA_BINS]."""
    beta_sum: np.ndarray
    """[L, H, n] float64."""
    plane: np.ndarray
    """[L, H, PLANE_BINS, PLANE_BINS], real part by imaginary part."""
    modulus: np.ndarray
    """[L, H, MODULUS_BINS]."""
    rotating: np.ndarray
    """[L, H] eigenvalues that are complex."""
    negative: np.ndarray
    """[L, H] eigenvalues whose real part is below 0."""
    tokens: np.ndarray
    """[L] read."""

    @classmethod
    def empty(cls, args: DeltaProductArgs) -> "Tally":
        heads, n = (args.num_hidden_layers, args.num_heads), args.num_householder

        def zeros(*shape: int) -> np.ndarray:
            return np.zeros((*heads, *shape), dtype=np.int64)

        return cls(
            zeros(n, BETA_BINS), np.zeros((*heads, n)), zeros(PLANE_BINS, PLANE_BINS), zeros(MODULUS_BINS), zeros(),
            zeros(), np.zeros(heads[0], dtype=np.int64),
        )  # fmt: skip

    def add(self, glimpse: Glimpse, top: float) -> None:
        """Counts a segment of a layer; `top`: the largest beta there can be."""
        layer, n = glimpse.layer, glimpse.num_householder
        beta = glimpse.beta.double().cpu().unflatten(1, (-1, n)).transpose(2, 3).flatten(0, 1)
        self.tokens[layer] += len(beta)
        self.beta[layer] += histogram(beta, BETA_BINS, 0, top)
        self.beta_sum[layer] += beta.sum(0).numpy()
        if not glimpse.positions:
            return
        k, b = glimpse.chosen_rows(glimpse.k).transpose(2, 3), glimpse.chosen_rows(glimpse.beta).transpose(2, 3)
        g = None if glimpse.g is None else glimpse.chosen_tokens(glimpse.g)
        finite = k.isfinite().all(-1).all(-1).all(-1) & b.isfinite().all(-1).all(-1)
        values = transition_eigenvalues(k[finite], b[finite], None if g is None else g[finite])
        # [tokens, H, n] -> [tokens * n, H]
        values = values.transpose(1, 2).flatten(0, 1)
        cell = bins_of(values.real, PLANE_BINS, -1, 1) * PLANE_BINS + bins_of(values.imag, PLANE_BINS, -1, 1)
        self.plane[layer] += count(cell, PLANE_BINS**2).reshape(-1, PLANE_BINS, PLANE_BINS)
        self.modulus[layer] += histogram(values.abs(), MODULUS_BINS, 0, 1)
        self.rotating[layer] += (values.imag.abs() > REAL).sum(0).numpy()
        self.negative[layer] += (values.real < 0).sum(0).numpy()


def bins_of(values: Tensor, bins: int, low: float, high: float) -> Tensor:
    """The bin of each value, int64; what lies outside is in the first or last."""
    return ((values - low) * (bins / (high - low))).floor().clamp(0, bins - 1).long()


def count(cells: Tensor, bins: int) -> np.ndarray:
    """[N, ...] int64 below `bins` -> [..., bins] int64, how often each occurs along the first dimension."""
    columns = cells[0].numel() if len(cells) else int(np.prod(cells.shape[1:]))
    place = torch.arange(columns).view(cells.shape[1:]) * bins
    return torch.bincount((cells + place).flatten(), minlength=columns * bins).view(*cells.shape[1:], bins).numpy()


def histogram(values: Tensor, bins: int, low: float, high: float) -> np.ndarray:
    """[N, ...] -> [..., bins] int64; values that are not finite are left out."""
    cells = torch.where(values.isfinite(), bins_of(values.nan_to_num(), bins, low, high), bins)
    return count(cells, bins + 1)[..., :bins]

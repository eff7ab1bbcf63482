"""Singular values of many matrices at once, and their effective rank.

    effective_rank(states)                     # [..., K, V] -> [...] float64
    singular_values(states)                    # [..., K, V] -> [..., min(K, V)] float64, descending

The effective rank is exp(-sum_i p_i ln p_i) with p the singular values over their sum (Roy & Vetterli 2007): r equal
ones and the rest zero give r. It needs no singular vectors, so they are the roots of the eigenvalues of S^T S (or
S S^T, the smaller) in float64, by LAPACK, a matrix a core: cores that share one matrix of this size are slower than one
alone (`python -m benchmarks.effective_rank`).

Squaring costs precision where it does not matter: an eigenvalue is off by some 1e-15 of the largest, so a singular
value s below the largest s_1 is off by 1e-15 s_1^2 / s. Those below sqrt(2.2e-16 max(K, V)) s_1, 1.7e-7 s_1 at 128,
count as zero: they are rounding of a float32 state. Each such p adds less than 3e-6 to the entropy.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def effective_rank(states: Tensor) -> Tensor:
    """exp of the entropy of the singular values as shares of their sum: states [..., K, V] -> [...] float64.

    From 1 to min(K, V); 0 for a state of zeros, which has no direction at all; NaN for one that is not finite.
    """
    return rank_of_values(singular_values(states))


def rank_of_values(values: Tensor) -> Tensor:
    """The effective rank of a matrix with the singular values [..., N]: [...]."""
    total = values.sum(-1, keepdim=True)
    rank = torch.special.entr(values / total).sum(-1).exp()
    return torch.where(total.squeeze(-1) == 0, 0.0, rank)


def singular_values(states: Tensor) -> Tensor:
    """Singular values of states [..., K, V], those that float64 squares cannot tell from zero as 0.

    [..., min(K, V)] float64 on the device of `states`, descending; NaN for a matrix that is not finite.
    """
    tall = (states if states.shape[-2] >= states.shape[-1] else states.mT).double()
    finite = tall.isfinite().all(-1).all(-1)[..., None]
    # LAPACK would raise on a matrix that is not finite; squares of the others must not overflow.
    tall = torch.where(finite[..., None], tall, 0.0)
    size = tall.abs().amax((-2, -1))[..., None]
    size = torch.where(size > 0, size, 1.0)
    tall = tall / size[..., None]
    squares = eigenvalues(tall.mT @ tall)
    largest = squares[..., -1:]
    squares = torch.where(squares < tall.shape[-2] * torch.finfo(torch.float64).eps * largest, 0.0, squares)
    return torch.where(finite, squares.sqrt() * size, torch.nan).flip(-1)


def eigenvalues(matrices: Tensor) -> Tensor:
    """Eigenvalues of symmetric matrices [..., N, N], ascending: [..., N] on their device."""
    flat, threads = matrices.reshape(-1, *matrices.shape[-2:]).cpu(), torch.get_num_threads()
    parts = flat.tensor_split(max(1, min(4 * threads, len(flat))))
    # LAPACK's own threads would take part in every matrix.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            values = torch.cat([*pool.map(torch.linalg.eigvalsh, parts)])
    finally:
        torch.set_num_threads(threads)
    return values.view(matrices.shape[:-1]).to(matrices.device)

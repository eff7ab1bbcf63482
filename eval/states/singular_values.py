"""Singular values of many states at once, and their effective rank.

    effective_rank(states)                     # [..., K, V] -> [...] float64
    singular_values(states)                    # [..., K, V] -> [..., min(K, V)] float64, descending

The effective rank is exp(-sum_i p_i ln p_i) with p the singular values over their sum (Roy & Vetterli 2007): r equal
ones and the rest zero give r. It needs no singular vectors, so they are the roots of the eigenvalues of S^T S (or
S S^T, the smaller) in float64: on a CPU by `singular_values.c`, many matrices side by side, compiled when first needed;
on CUDA, or without a compiler, by `torch.linalg.eigvalsh`.

Squaring costs precision where it does not matter: an eigenvalue is off by some 1e-15 of the largest, so a singular
value s below the largest s_1 is off by 1e-15 s_1^2 / s. Those below sqrt(2.2e-16 max(K, V)) s_1, 1.7e-7 s_1 at 128,
count as zero: they are rounding of a float32 state. Each such p adds less than 3e-6 to the entropy.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .native import load

TOGETHER = 64
"""Matrices are handed to threads in multiples of this: what comes out does not depend on the number of threads."""
FEWEST = 8
"""Fewer matrices go to LAPACK: lanes of the compiled code would idle."""


def effective_rank(states: Tensor) -> Tensor:
    """exp of the entropy of the singular values as shares of their sum.

    Args:
        states: [..., K, V], any floating dtype, on any device.

    Returns:
        [...] float64, from 1 to min(K, V); 0 for a state of zeros, which has no direction at all; NaN for one that is
        not finite.
    """
    values = _values(states)
    total = values.sum(-1, keepdim=True)
    shares = values / total
    rank = torch.special.entr(shares).sum(-1).exp()
    return torch.where(total.squeeze(-1) == 0, 0.0, rank)


def singular_values(states: Tensor, compiled: bool = True) -> Tensor:
    """Singular values, those that float64 squares cannot tell from zero as 0.

    Args:
        states: [..., K, V].
        compiled: False: never by the compiled code.

    Returns:
        [..., min(K, V)] float64 on the device of `states`, descending; NaN for a matrix that is not finite.
    """
    return _values(states, compiled).sort(-1, descending=True).values


def _values(states: Tensor, compiled: bool = True) -> Tensor:
    """`singular_values` in any order."""
    tall = states if states.shape[-2] >= states.shape[-1] else states.mT
    rows, cols = tall.shape[-2:]
    flat = tall.reshape(-1, rows, cols).contiguous()
    flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
    size = 1.0
    if flat.dtype == torch.float64:
        # Its squares could overflow.
        size = flat.abs().amax((-2, -1)).unsqueeze(-1)
        size = torch.where(size > 0, size, 1.0)
        flat = flat / size.unsqueeze(-1)
    squares = _squares(flat, compiled)
    largest = squares.amax(-1, keepdim=True)
    squares = torch.where(squares < rows * torch.finfo(torch.float64).eps * largest, 0.0, squares)
    return (squares.sqrt() * size).view(*states.shape[:-2], cols)


def _squares(states: Tensor, compiled: bool) -> Tensor:
    """Eigenvalues of S^T S, in any order: [N, rows, cols] contiguous, rows >= cols -> [N, cols] float64."""
    library = None
    if compiled and states.device.type == "cpu" and len(states) >= FEWEST:
        library = load("singular_values")
    if library is None:
        return _library_squares(states)
    out = states.new_empty(len(states), states.shape[2], dtype=torch.float64)

    def work(first: int) -> None:
        part, to = states[first : first + share], out[first : first + share]
        wide, pointers = int(states.dtype == torch.float64), (part.data_ptr(), to.data_ptr())
        if library.singular_values(ctypes.c_void_p(pointers[0]), wide, ctypes.c_void_p(pointers[1]),
                                   ctypes.c_long(len(part)), states.shape[1], states.shape[2]):  # fmt: skip
            raise MemoryError("singular_values.c: out of memory")

    threads = torch.get_num_threads()
    share = -(-len(states) // (threads * TOGETHER)) * TOGETHER
    firsts = range(0, len(states), share)
    if len(firsts) == 1:
        work(0)
    else:
        # ctypes releases the interpreter's lock.
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, firsts))
    failed = ~out.isfinite().all(-1)
    if failed.any():
        # Not finite, or one of the rare cases that the compiled code leaves alone.
        out[failed] = _library_squares(states[failed])
    return out


def _library_squares(states: Tensor) -> Tensor:
    """`_squares` by `torch.linalg`; NaN for matrices that are not finite, on which LAPACK would raise."""
    finite = states.isfinite().all(-1).all(-1)
    doubles = torch.where(finite[:, None, None], states, 0.0).double()
    return torch.where(finite[:, None], torch.linalg.eigvalsh(doubles.mT @ doubles), torch.nan)

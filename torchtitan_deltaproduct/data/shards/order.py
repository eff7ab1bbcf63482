"""Which window is sample number i? A pure function, so that any step can be reached directly.

    order = Order(sizes=(1000, 300), weights=(0.7, 0.3), seed=1, shuffle=True)
    source, window = order(np.array([0, 1, 10**9]))

Sources take turns in a fixed, evenly spaced pattern that repeats; a source visits all its windows once an
epoch, in a new pseudo-random order each time. Nothing is drawn in sequence and nothing is stored: sample
10^9 costs what sample 10 does.
"""

from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from math import isqrt, lcm

import numpy as np

from torchtitan_deltaproduct.errors import ConfigError

from ..counter import mix

# Longest pattern of sources. Shares are exact to 1/PERIOD, and quite exact when decimal weights allow it.
PERIOD = 1 << 16


class Permutation:
    """A keyed bijection of [0, size), evaluated at single points.

    An alternating Feistel network on the grid rows x cols that just covers [0, size): each round shifts one
    coordinate by a hash of the other. A point that lands outside [0, size) is sent through again (cycle
    walking; Black & Rogaway 2002, "Ciphers with arbitrary finite domains"), which happens less than once in
    sqrt(size) times.
    """

    def __init__(self, size: int, *key):
        self.size = size
        rows = isqrt(size - 1) + 1
        self.rows, self.cols = np.uint64(rows), np.uint64(-(-size // rows))
        self.round_keys = np.frombuffer(blake2b(repr(key).encode(), digest_size=64).digest(), dtype="<u8")

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """index: [n] int64 in [0, size) -> [n] int64 in [0, size)."""
        out = self._network(np.asarray(index).astype(np.uint64))
        while (outside := out >= self.size).any():
            out[outside] = self._network(out[outside])
        return out.astype(np.int64)

    def _network(self, x: np.ndarray) -> np.ndarray:
        row, col = np.divmod(x, self.cols)
        for even, odd in self.round_keys.reshape(-1, 2):
            row = (row + (mix(col ^ even) >> np.uint64(1))) % self.rows
            col = (col + (mix(row ^ odd) >> np.uint64(1))) % self.cols
        return row * self.cols + col


_permutation = lru_cache(maxsize=64)(Permutation)


def quotas(weights: tuple[float, ...]) -> list[int]:
    """Samples of each source in one period of the pattern: integers in the proportion of `weights`.

    The period is the shortest that is exact when the weights are decimals such as 0.7 and 0.3; if that is
    longer than `PERIOD`, it is `PERIOD`, filled by largest remainder.
    """
    if any(not 0 < w < float("inf") for w in weights):
        raise ConfigError(f"data.weights is {list(weights)}: every weight must be a positive number")
    exact = [Fraction(str(float(w))) for w in weights]
    shares = [w / sum(exact) for w in exact]
    period = lcm(*(share.denominator for share in shares))
    if period <= PERIOD:
        return [int(share * period) for share in shares]
    counts = [int(share * PERIOD) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k] * PERIOD)
    for k in by_remainder[: PERIOD - sum(counts)]:
        counts[k] += 1
    if 0 in counts:
        raise ConfigError(
            f"data.weights is {list(weights)}: the share of a source must be at least 1/{PERIOD}; "
            "drop the smallest or raise it"
        )
    return counts


class Order:
    """The sequence of windows of a run, from sources of `sizes` windows, at least 1, in the proportion of `weights`.

    The seed of the shuffle does not change which source a sample comes from. Without shuffling, windows come in order.
    """

    def __init__(self, sizes: tuple[int, ...], weights: tuple[float, ...], seed: int, shuffle: bool):
        self.sizes = np.array(sizes, dtype=np.int64)
        self.quotas = np.array(quotas(weights), dtype=np.int64)
        self.seed, self.shuffle = seed, shuffle
        # The j-th of the q samples of a source stands at (j + 1/2) / q of the period.
        turn = np.concatenate([np.arange(q) for q in self.quotas])
        source = np.repeat(np.arange(len(sizes)), self.quotas)
        pattern = np.lexsort((source, (turn + 0.5) / self.quotas[source]))
        self.turn, self.source = turn[pattern], source[pattern]

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """samples: [n] int64 global sample indices -> source [n], window [n] int64."""
        period, slot = np.divmod(np.asarray(samples, dtype=np.int64), len(self.source))
        source = self.source[slot]
        epoch, window = np.divmod(period * self.quotas[source] + self.turn[slot], self.sizes[source])
        if self.shuffle:
            for s, e in set(zip(source.tolist(), epoch.tolist(), strict=True)):
                chosen = (source == s) & (epoch == e)
                permutation = _permutation(int(self.sizes[s]), self.seed, s, e)
                window[chosen] = permutation(window[chosen])
        return source, window

    def epochs(self, sample: int) -> list[float]:
        """Passes over each source made by the samples before `sample`."""
        period, slot = divmod(sample, len(self.source))
        partial = np.bincount(self.source[:slot], minlength=len(self.sizes))
        return [(period * int(q) + int(p)) / int(n) for q, p, n in zip(self.quotas, partial, self.sizes, strict=True)]

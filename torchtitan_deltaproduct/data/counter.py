"""Random numbers with an address: a pure function of (key, sample, position), for whole batches at once.

    key = stream_key("group_word", 7, "train")                 # seed 7
    draws(key, np.array([0, 10**9]), 64)                       # [2, 64] uint64

Nothing is drawn in sequence, so sample 10^9 costs what sample 10 does and every rank can make its own. The
counter is mixed twice under a 128-bit key. numpy's Philox would need a call for each sample: 7 million 32-bit
numbers a second, 128 a sample, against 300 million here. Not for cryptography.
"""

from hashlib import blake2b

import numpy as np

# The counter is sample * 2**POSITION_BITS + position: no two addresses of a stream share a number.
POSITION_BITS = 24
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): a bijection; every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_key(*name) -> np.ndarray:
    """Another name, another stream: [2] uint64 from any values with a stable repr."""
    return np.frombuffer(blake2b(repr(name).encode(), digest_size=16).digest(), dtype="<u8")


def draws(key: np.ndarray, samples: np.ndarray, positions: int) -> np.ndarray:
    """64 random bits for each of the first `positions` (at most 2**24) positions of each sample.

    `samples`: [n] int64 in [0, 2**40) -> [n, positions] uint64. More positions do not change the first ones.
    """
    assert positions <= 1 << POSITION_BITS
    rows = np.asarray(samples).astype(np.uint64) << np.uint64(POSITION_BITS)
    counter = rows[:, None] + np.arange(positions, dtype=np.uint64)
    return mix(mix((counter * _GOLDEN) ^ key[0]) + key[1])


def below(bits: np.ndarray, bound) -> np.ndarray:
    """Uniform whole numbers in [0, bound), int64, from 32 random bits each; biased by less than bound / 2**32.

    `bits`: uint32, or uint64 of which the upper half is used. `bound`: at least 1; a number, or one for each of `bits`.
    """
    high = bits >> np.uint64(32) if bits.dtype == np.uint64 else bits.astype(np.uint64)
    return ((high * np.asarray(bound).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)

"""95 % intervals: of a mean of independent values, and of a share.

half = student_t(len(values) - 1) * standard_error
low, high = wilson(18, 20)
"""

from functools import lru_cache

import numpy as np

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


@lru_cache
def student_t(degrees: int) -> float:
    """The t with P(|T| < t) = 95 %, of Student's distribution with so many degrees of freedom."""
    from scipy.special import stdtrit  # `scipy.stats` takes a second to import

    return float(stdtrit(degrees, 0.975))


def wilson(successes, trials) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927): lower and upper end, NaN without trials.

    The count of successes may be fractional: for a mean of n values in [0, 1] give n times the mean. Their variance is
    at most that of a coin of the same mean, so the interval is then conservative.
    """
    n, z = np.asarray(trials, dtype=np.float64), Z95
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.asarray(successes, dtype=np.float64) / n
        center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # At p = 0 and p = 1 one end is exact, and rounding must not move it past the estimate.
    return np.minimum(np.maximum(center - half, 0), p), np.maximum(np.minimum(center + half, 1), p)

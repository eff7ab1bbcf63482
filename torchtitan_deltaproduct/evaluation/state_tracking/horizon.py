"""How far a model that solves a group goes before it errs, predicted from where it has lost a third of its margin.

    predicted_horizon(least_margin)     # tokens; None: a third is not lost in what was read
    horizon(prefix, words)              # the same, measured; None: beyond the tested length

The horizon is the last position up to which half of the words are right throughout. The margin of a token is the
logit of the right answer less the largest of the others. A solved model starts with a margin m, and a word loses of it
as errors of the state are carried on. The logarithm of the loss, ln(m - median over words of the least margin up to
t), is close to a line in t^(3/4); fitted from a quarter of the way up to where a third of m is lost, it reaches ln(m)
at the horizon.

An observation, not a theorem: the rule was found on models of S3, and the claim `horizon` (docs/science.md) holds it to
models that it was not found on.
"""

import numpy as np

SHARE = 1 / 3
"""Of the margin that is lost where a prediction is made."""
POWER = 0.75
"""Of the position, in which the logarithm of the loss is a line."""
FEWEST = 8
"""Positions that a line is fitted to, at least."""
MOST_LENGTHS = 16
"""Training lengths up to which margins are kept."""


def predicted_horizon(least_margin: np.ndarray) -> float | None:
    """The position at which half of the words have erred, or None where that cannot be told.

    Args:
        least_margin: [L] median over words of the least margin at positions up to each; infinite where no position had
            a label yet.
    """
    positions = np.flatnonzero(np.isfinite(least_margin)) + 1
    least = least_margin[positions - 1]
    if not len(least) or least[0] <= 0:
        return None
    lost = least[0] - least
    if lost[-1] < SHARE * least[0]:
        return None
    reach = positions[(lost >= SHARE * least[0]).argmax()]
    fitted = (positions >= reach // 4) & (positions <= reach) & (lost > 0)
    if fitted.sum() < FEWEST:
        return None
    slope, offset = np.polyfit(positions[fitted] ** POWER, np.log(lost[fitted]), 1)
    return float(((np.log(least[0]) - offset) / slope) ** (1 / POWER))


def horizon(prefix: np.ndarray, words: int) -> int | None:
    """The last position up to which half of the words are right; None if they still are at the last one.

    Args:
        prefix: [L] words that are right at every position up to each.
        words: how many there are.
    """
    right = int((2 * prefix >= words).sum())
    return right if right < len(prefix) else None

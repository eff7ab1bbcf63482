"""How far a model that solves a group goes before it errs, predicted from words of twice the training length.

    predicted_horizon(least_margin, train_length)     # tokens; None: it errs before, or no end is in sight
    horizon(prefix, words)                            # the same, measured; None: beyond the tested length

The horizon is the last position up to which half of the words are right throughout. The margin of a token is the
logit of the right answer less the largest of the others. A solved model starts with a margin m, and a word loses of it
as errors of the state are carried on: the logarithm of the loss, ln(m - median over words of the least margin up to t),
is close to a line in t^(3/4). It is fitted over t = T/2 .. 2 T, T the training length, and the horizon is where it
reaches ln(m).

An observation, not a theorem. The rule was found on thirteen models of S3 (train_configs/claims/S3.toml, horizons of 3
to 15 T): in twelve it is off by a factor of 1.25 at most, in one by 1.7. With t in the place of t^(3/4) it is 20 %
short. The claim `horizon` holds it to models that it was not found on.
"""

import numpy as np

REACH = 2
"""Training lengths that a prediction looks at."""
POWER = 0.75
"""Of the position, in which the logarithm of the loss is a line."""


def predicted_horizon(least_margin: np.ndarray, train_length: int) -> float | None:
    """The position at which half of the words have erred; None if no end is in sight, or it comes too soon.

    Args:
        least_margin: [L] median over words of the least margin at positions up to each, L at least 2 `train_length`;
            infinite where no position had a label yet.
        train_length: in tokens.
    """
    reach, begin = REACH * train_length, train_length // 2
    labelled = np.isfinite(least_margin[:reach])
    if len(labelled) < reach or not labelled[begin - 1 :].any() or least_margin[reach - 1] <= 0:
        return None
    margin = least_margin[labelled.argmax()]
    positions = np.flatnonzero(labelled[begin - 1 :]) + begin
    lost = np.maximum(margin - least_margin[positions - 1], 1e-3)
    slope, offset = np.polyfit(positions**POWER, np.log(lost), 1)
    return float(((np.log(margin) - offset) / slope) ** (1 / POWER)) if slope > 1e-9 else None


def horizon(prefix: np.ndarray, words: int) -> int | None:
    """The last position up to which half of the words are right; None if they still are at the last one.

    Args:
        prefix: [L] words that are right at every position up to each.
        words: how many there are.
    """
    right = int((2 * prefix >= words).sum())
    return right if right < len(prefix) else None

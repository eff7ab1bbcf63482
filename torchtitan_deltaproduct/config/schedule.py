"""The learning-rate factor of every step, as torchtitan 0.2.2's `build_lr_schedulers` defines it.

    >>> shape = dict(decay_ratio=None, decay_type="cosine", min_lr_factor=0.1)
    >>> lr_factor(0, warmup_steps=10, total_steps=100, **shape)
    0.1

Warm-up is linear; then the factor is 1 until the decay begins (directly after the warm-up if `decay_ratio` is
None, else for the last `decay_ratio` of the steps: warmup-stable-decay, https://arxiv.org/abs/2404.06395).
"""

import math
from typing import Literal


def decay_steps_of(total_steps: int, warmup_steps: int, decay_ratio: float | None) -> int:
    """Steps of the decay, before it is cut to what the warm-up leaves."""
    return total_steps - warmup_steps if decay_ratio is None else round(total_steps * decay_ratio)


def lr_factor(
    step: int,
    *,
    warmup_steps: int,
    total_steps: int,
    decay_ratio: float | None,
    decay_type: Literal["linear", "sqrt", "cosine"],
    min_lr_factor: float,
) -> float:
    """The multiple of `optimizer.lr` that a step uses.

    Args:
        step: Steps done before, from 0: the first step of a run is 0, its last `total_steps - 1`.
        warmup_steps: Steps of the linear warm-up; the factor is 1 at the last of them.
        total_steps: Length of the schedule; beyond it the factor is not meaningful.
        decay_ratio: Share of `total_steps` that decays; None: all after the warm-up.
        decay_type: Shape of the decay.
        min_lr_factor: Factor at the end of the decay. It is reached one step after the last, so that no step
            is spent at a factor of 0.
    """
    warmup = min(warmup_steps, total_steps)
    decay = min(decay_steps_of(total_steps, warmup, decay_ratio), total_steps - warmup)
    if step < warmup:
        return (step + 1) / warmup
    first_decaying = total_steps + 1 - decay
    if step < first_decaying:
        return 1.0
    progress = (step + 1 - first_decaying) / decay
    shape = {
        "linear": lambda: 1 - progress,
        "sqrt": lambda: 1 - math.sqrt(progress),
        "cosine": lambda: 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[decay_type]()
    return min_lr_factor + (1 - min_lr_factor) * shape

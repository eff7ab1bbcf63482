"""The learning-rate factor of every step, as torchtitan 0.2.2's `build_lr_schedulers` defines it.

    >>> schedule = Schedule(warmup_steps=10, total_steps=100, decay_ratio=None, decay_type="cosine", min_lr_factor=0.1)
    >>> schedule(0)
    0.1

Warm-up is linear; then the factor is 1 until the decay begins (directly after the warm-up if `decay_ratio` is
None, else for the last `decay_ratio` of the steps: warmup-stable-decay, https://arxiv.org/abs/2404.06395).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torchtitan.config import LRScheduler


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The curve of a run: `schedule(step)` is the multiple of `optimizer.lr` that a step uses."""

    warmup_steps: int
    """Steps of the linear warm-up; the factor is 1 at the last of them."""
    total_steps: int
    """Length of the schedule; beyond it the factor is not meaningful."""
    decay_ratio: float | None
    """Share of `total_steps` that decays; None: all after the warm-up."""
    decay_type: Literal["linear", "sqrt", "cosine"]
    """Shape of the decay."""
    min_lr_factor: float
    """Factor at the end of the decay. It is reached one step after the last, so that no step is spent at 0."""

    @classmethod
    def of(cls, table: "LRScheduler", training_steps: int) -> "Schedule":
        """The schedule that `[lr_scheduler]` describes for a run of so many steps."""
        return cls(
            warmup_steps=table.warmup_steps,
            total_steps=training_steps if table.total_steps is None else table.total_steps,
            decay_ratio=table.decay_ratio,
            decay_type=table.decay_type,
            min_lr_factor=table.min_lr_factor,
        )

    @property
    def decay_steps(self) -> int:
        """Steps of the decay, before it is cut to what the warm-up leaves."""
        if self.decay_ratio is None:
            return max(0, self.total_steps - self.warmup_steps)
        return round(self.total_steps * self.decay_ratio)

    @property
    def fits(self) -> bool:
        """Whether warm-up and decay fit in the schedule one after the other."""
        return self.warmup_steps + self.decay_steps <= self.total_steps

    def __call__(self, step: int) -> float:
        """The factor of a step, counted from 0: the first step of a run is 0, its last `total_steps - 1`."""
        warmup = min(self.warmup_steps, self.total_steps)
        decay = min(self.decay_steps, self.total_steps - warmup)
        if step < warmup:
            return (step + 1) / warmup
        first_decaying = self.total_steps + 1 - decay
        if step < first_decaying:
            return 1.0
        progress = (step + 1 - first_decaying) / decay
        shape = {
            "linear": lambda: 1 - progress,
            "sqrt": lambda: 1 - math.sqrt(progress),
            "cosine": lambda: 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[self.decay_type]()
        return self.min_lr_factor + (1 - self.min_lr_factor) * shape

"""The learning-rate factor of every step, as torchtitan 0.2.2's `build_lr_schedulers` defines it.

    >>> schedule = Schedule(warmup_steps=10, total_steps=100, decay_steps=90, decay_type="cosine", min_lr_factor=0.1)
    >>> schedule(0), schedule.phases()
    (0.1, {'warm-up': (1, 10), 'decay': (11, 100)})

Warm-up is linear; then the factor is 1 until the decay begins: directly after the warm-up, or for the last
`decay_ratio` of the steps, or under `schedule = "wsd"` (warm-up, stable, decay: https://arxiv.org/abs/2404.06395) for
the last `decay_steps`.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .job import LRScheduler

WSD_DECAY = 0.1
"""Share of the steps that decay under "wsd" where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The curve of a run: `schedule(step)` is the multiple of `optimizer.lr` that a step uses."""

    warmup_steps: int
    """Steps of the linear warm-up; the factor is 1 at the last of them."""
    total_steps: int
    """Length of the schedule; beyond it the factor is not meaningful."""
    decay_steps: int
    """Steps of the decay, before it is cut to what the warm-up leaves."""
    decay_type: Literal["linear", "sqrt", "cosine"]
    """Shape of the decay."""
    min_lr_factor: float
    """Factor at the end of the decay. It is reached one step after the last, so that no step is spent at 0."""

    @classmethod
    def of(cls, table: "LRScheduler", training_steps: int) -> "Schedule":
        """The schedule that `[lr_scheduler]` describes for a run of so many steps."""
        total = training_steps if table.total_steps is None else table.total_steps
        ratio = WSD_DECAY if table.schedule == "wsd" and table.decay_ratio is None else table.decay_ratio
        if table.decay_steps is not None:
            decay = table.decay_steps
        else:
            decay = max(0, total - table.warmup_steps) if ratio is None else round(total * ratio)
        return cls(
            warmup_steps=table.warmup_steps,
            total_steps=total,
            decay_steps=decay,
            decay_type=table.decay_type,
            min_lr_factor=table.min_lr_factor,
        )

    @property
    def fits(self) -> bool:
        """Whether warm-up and decay fit in the schedule one after the other."""
        return self.warmup_steps + self.decay_steps <= self.total_steps

    @property
    def last_at_peak(self) -> int:
        """The last step before the factor falls, counted from 1; `total_steps` where it never does."""
        decay = min(self.decay_steps, self.total_steps - min(self.warmup_steps, self.total_steps))
        return min(self.total_steps, self.total_steps + 1 - decay)

    def phases(self) -> dict[str, tuple[int, int]]:
        """The first and last step of `warm-up`, `stable` and `decay`, counted from 1, where it has more than one step.

        The step at the peak between warm-up and a decay that follows it at once is counted to the decay.
        """
        warmup, last = min(self.warmup_steps, self.total_steps), self.last_at_peak
        phases = {"warm-up": (1, warmup), "stable": (warmup + 1, last), "decay": (last + 1, self.total_steps)}
        if last == warmup + 1 < self.total_steps:
            phases |= {"stable": (1, 0), "decay": (last, self.total_steps)}
        return {name: (first, end) for name, (first, end) in phases.items() if first <= end}

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

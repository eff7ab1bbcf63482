"""Loss spikes: a step whose loss stands far above the recent ones.

    spikes = LossSpikes(threshold=8.0)
    if spike := spikes.observe(loss): logger.warning("step %d: %s", step, spike)

Far is measured from the median of the last steps in units of their spread (1.4826 times the median absolute deviation,
which is the standard deviation for normal noise), so that one spike does not hide the next. Only a warning: whether to
skip data or to go back is for a person to decide.
"""

import statistics
from collections import deque

WINDOW, LEAST = 128, 32
"""Steps that are remembered, and how many there must be before any is judged."""
SMALLEST = 0.01
"""Spread, in nats, below which differences are not worth a warning."""


class LossSpikes:
    """Remembers the last losses; part of what a checkpoint holds, so that a restart judges alike.

    Args:
        threshold: deviations above the median that make a spike; 0: none is reported.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def observe(self, loss: float) -> str:
        """Takes in the finite loss of a step (nats a token); says in words how far it stands out, or ""."""
        spike = ""
        if self.threshold > 0 and len(self.losses) >= LEAST:
            median = statistics.median(self.losses)
            spread = max(1.4826 * statistics.median(abs(x - median) for x in self.losses), SMALLEST)
            deviations = (loss - median) / spread
            if deviations > self.threshold:
                spike = (
                    f"loss {loss:.4f} is {deviations:.1f} deviations above {median:.4f}, "
                    f"the median of the last {len(self.losses)} steps"
                )
        self.losses.append(loss)
        return spike

    def state_dict(self) -> dict[str, list[float]]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.losses = deque(state["losses"], maxlen=WINDOW)

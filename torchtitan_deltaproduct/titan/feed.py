"""The global batches of this rank on its device, read one step ahead.

    feed = Feed(loader, micro_batches=4, device=device)
    for inputs, labels in feed.take(): ...       # this step's
    feed.read_ahead()                            # the next step's, while the device works on these
    feed.state_dict()                            # the position after what was taken: what was read ahead does not count

On a GPU batches go through pinned memory and are copied behind the work that is queued already, without a wait: a
micro-batch of 8 x 4,096 tokens is half a megabyte, 20 microseconds of a step.
"""

import copy
import time
from collections.abc import Callable

import torch

from ..data.loader import Batch, Loader
from ..models.loss import IGNORE_INDEX
from ..models.model import document_positions
from ..ops import SequenceRanks


class Feed:
    """Hands out this rank's batches; in a checkpoint it stands for the loader.

    Args:
        loader: of this rank.
        micro_batches: of a global batch.
        device: where batches are to be.
        ranks: that share each sequence; the loader reads whole ones, of which this keeps its own part.
    """

    def __init__(
        self, loader: Loader, micro_batches: int, device: torch.device, ranks: SequenceRanks | None = None
    ) -> None:
        self.loader, self.micro_batches, self.device, self.ranks = loader, micro_batches, device, ranks
        self.taken = copy.copy(loader)
        """The loader as it was when the last batch was taken."""
        self.batches = None
        self.ahead: list[Batch] = []
        self.error: Exception | None = None
        self.labels = 0
        """Labels on this rank of the global batch read last, ignored ones left out."""
        self.seconds = 0.0
        """How long reading it took, without the copy."""

    def read_ahead(self) -> None:
        """Reads the next global batch and starts its copy to the device.

        An error is raised when that batch is taken: the step before it can end, and be saved.
        """
        try:
            self._read()
        except Exception as error:
            self.error, self.labels = error, 0

    def _read(self) -> None:
        start = time.perf_counter()
        self.batches = self.batches or iter(self.loader)
        batches = [own_part(next(self.batches), self.ranks) for _ in range(self.micro_batches)]
        self.labels = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in batches)
        self.seconds = time.perf_counter() - start
        self.ahead = [
            ({name: to_device(tensor, self.device) for name, tensor in inputs.items()}, to_device(labels, self.device))
            for inputs, labels in batches
        ]

    def take(self) -> list[Batch]:
        """The next global batch, as micro-batches; reads it now if it was not read ahead."""
        if self.error is not None:
            raise self.error
        if not self.ahead:
            self._read()
        self.taken = copy.copy(self.loader)
        batches, self.ahead = self.ahead, []
        return batches

    def epochs(self) -> dict[str, float]:
        """Passes over each part of the data by what was taken."""
        return self.taken.epochs()

    def state_dict(self) -> dict[str, int | str]:
        return self.taken.state_dict()

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        self.close()
        self.loader.load_state_dict(state)
        self.taken = copy.copy(self.loader)

    def close(self) -> None:
        """Lets go of what was read ahead and of the processes that read."""
        self.batches, self.ahead, self.error = None, [], None


def own_part(batch: Batch, ranks: SequenceRanks | None) -> Batch:
    """The tokens, labels and document positions of this rank's part of each row; the batch as it is without `ranks`.

    Args:
        batch: tensors [B, T]; `document_starts` become `positions`, counted over the whole row.
        ranks: T is a multiple of their number.
    """
    if ranks is None:
        return batch
    inputs, labels = batch
    length = labels.shape[1] // ranks.size
    own = slice(ranks.rank * length, (ranks.rank + 1) * length)
    inputs = dict(inputs)
    starts = inputs.pop("document_starts", None)
    if starts is not None:
        inputs["positions"] = document_positions(starts)
    return {name: tensor[:, own].contiguous() for name, tensor in inputs.items()}, labels[:, own].contiguous()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device` that nobody waits for; on the CPU the tensor itself."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(numbers: torch.Tensor) -> Callable[[], list[float]]:
    """Starts a copy of `numbers`, [n], behind the queued work, to pinned memory; the function returned waits for it."""
    copied = numbers.to("cpu", non_blocking=True)
    event = torch.cuda.current_stream().record_event() if numbers.is_cuda else None

    def wait() -> list[float]:
        if event is not None:
            event.synchronize()
        return copied.tolist()

    return wait

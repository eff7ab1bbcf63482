"""Raw results on disk: the loss at every position of every sequence, a file for each batch of sequences.

    losses = Losses.open(folder, loaded, fingerprint(loaded.model), texts, {"batch": 4, "segment": 1024})
    for part in losses.missing(): losses.compute(part, loaded.model, texts)
    losses.sums([0, 512, 1024, 32_768]).between(513, 1024)         # by sequence

A file is an array [sequences, length] of `loss.POSITION`: `np.load(path, mmap_mode="r")` reads it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.models import DeltaProductLM

from ..parts import Part, Parts, Sequences
from ..row_file import RowFile, RowWriter
from .loss import POSITION, score

BLOCK = 1 << 16
"""Positions read back at a time."""


@dataclass(frozen=True)
class Sums:
    """Sums over the first positions of each of S sequences.

    Attributes:
        edges: [E] int64, numbers of positions, rising from 0.
        loss: [S, E] float64, of the losses (nats) of the first `edges[e]` positions.
        correct: [S, E] int64, right predictions among them.
    """

    edges: np.ndarray
    loss: np.ndarray
    correct: np.ndarray

    def between(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean loss and accuracy of each sequence at positions first .. last, counted from 1: [S] float64 each."""
        a, b = np.searchsorted(self.edges, [first - 1, last])
        assert self.edges[a] == first - 1 and self.edges[b] == last
        count = last - first + 1
        return (self.loss[:, b] - self.loss[:, a]) / count, (self.correct[:, b] - self.correct[:, a]) / count


class Losses(Parts):
    """Raw losses of one model on one set of sequences."""

    suffix, version = ".npy", 1

    def checked(self, part: Part) -> RowFile:
        path, shape = self.path(part), (part[1] - part[0], self.about["length"])
        try:
            file = RowFile(path)
            if (file.shape, file.dtype) != (shape, POSITION):
                raise DataError(f"{path} holds {file.dtype} {list(file.shape)}, expected losses {list(shape)}")
        except DataError as error:
            raise DataError(f"{error}\ndelete the file: the same command computes it again") from None
        return file

    def compute(
        self, part: Part, model: DeltaProductLM, texts: Sequences, progress: Callable[[int], None] | None = None
    ) -> None:
        """Runs the model over the sequences of a part; `progress` is told the tokens after each segment."""
        first, last = part
        with RowWriter(self.path(part), POSITION, last - first, texts.length) as out:

            def read(start: int, stop: int) -> np.ndarray:
                return texts.read(first, last, start, stop)

            for start, loss, correct in score(model, read, texts.length, self.about["segment"]):
                found = np.empty(loss.shape, POSITION)
                found["loss"], found["correct"] = loss, correct
                for row, values in enumerate(found):
                    out.write(row, start, values)
                if progress:
                    progress(found.size)

    def sums(self, edges: Iterable[int]) -> Sums:
        """Sums of all parts up to each of `edges`; 0 and the length are added.

        Raises:
            DataError: a part is missing or damaged.
        """
        length = self.about["length"]
        edges = np.unique([0, length, *edges])
        loss, correct = (np.zeros((self.about["sequences"], len(edges)), kind) for kind in (np.float64, np.int64))
        for part in self.all:
            file = self.checked(part)
            for row in range(*part):
                for start in range(0, length, BLOCK):
                    stop = min(start + BLOCK, length)
                    values = file.read(row - part[0], start, stop)
                    # Position t, from 0, is the last of t + 1: it counts for the first edge that is no smaller.
                    edge = np.searchsorted(edges, np.arange(start + 1, stop + 1))
                    loss[row] += np.bincount(edge, values["loss"], len(edges))
                    correct[row] += np.bincount(edge[values["correct"]], minlength=len(edges))
        return Sums(edges, loss.cumsum(1), correct.cumsum(1))

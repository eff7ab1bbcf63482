"""Raw results on disk: the loss at every position of every sequence, a file for each batch of sequences.

    parts = open_parts(folder, loaded, fingerprint(loaded.model), texts, batch=4, segment=1024)
    for part in parts.missing(): parts.compute(part, loaded.model, texts)
    parts.sums([0, 512, 1024, 32_768]).between(513, 1024)         # by sequence

    FOLDER/MODEL-DATA-KEY/about.json          what it belongs to: weights, sequences, how they are read
                         /00000-00003.npy     [4, length] of `position_loss.POSITION`: np.load(..., mmap_mode="r")

A file has its name once it is complete, so a killed eval continues with those that are missing. What a part holds
depends on `about.json` alone, not on who computed it when, to the last bit on the same kind of device and with the
same number of threads. KEY is drawn from it: another model, or other sequences, have another folder.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.data.manifest import write_atomically
from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.models import DeltaProductLM

from .position_loss import POSITION, score
from .row_file import RowFile, RowWriter
from .texts import Texts, digest, slug

VERSION = 1
BLOCK = 1 << 16
"""Positions read back at a time."""

Part = tuple[int, int]
"""Sequences first .. last - 1."""


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


@dataclass(frozen=True)
class Parts:
    """A folder of raw results.

    Attributes:
        folder: of one model on one set of sequences.
        about: what it belongs to; see `open_parts`.
    """

    folder: Path
    about: dict

    @property
    def all(self) -> list[Part]:
        sequences, batch = self.about["sequences"], self.about["batch"]
        return [(first, min(first + batch, sequences)) for first in range(0, sequences, batch)]

    def path(self, part: Part) -> Path:
        return self.folder / f"{part[0]:05d}-{part[1] - 1:05d}.npy"

    def missing(self) -> list[Part]:
        """Parts to compute.

        Raises:
            DataError: one that is there has been damaged since it was written.
        """
        return [part for part in self.all if not self.path(part).exists() or not self._checked(part)]

    def _checked(self, part: Part) -> RowFile:
        path, shape = self.path(part), (part[1] - part[0], self.about["length"])
        try:
            file = RowFile(path)
            if (file.shape, file.dtype) != (shape, POSITION):
                raise DataError(f"{path} holds {file.dtype} {list(file.shape)}, expected losses {list(shape)}")
        except DataError as error:
            raise DataError(f"{error}\ndelete the file: the same command computes it again") from None
        return file

    def compute(
        self, part: Part, model: DeltaProductLM, texts: Texts, progress: Callable[[int], None] | None = None
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

    def tidy(self) -> None:
        """Removes what killed runs left behind; for when no part is missing."""
        for path in self.folder.glob("*.npy.tmp*"):
            path.unlink(missing_ok=True)

    def sums(self, edges: Iterable[int]) -> Sums:
        """Sums of all parts up to each of `edges`; 0 and the length are added.

        Raises:
            DataError: a part is missing or damaged.
        """
        length = self.about["length"]
        edges = np.unique([0, length, *edges])
        loss, correct = (np.zeros((self.about["sequences"], len(edges)), kind) for kind in (np.float64, np.int64))
        for part in self.all:
            file = self._checked(part)
            for row in range(*part):
                for start in range(0, length, BLOCK):
                    stop = min(start + BLOCK, length)
                    values = file.read(row - part[0], start, stop)
                    # Position t, from 0, is the last of t + 1: it counts for the first edge that is no smaller.
                    edge = np.searchsorted(edges, np.arange(start + 1, stop + 1))
                    loss[row] += np.bincount(edge, values["loss"], len(edges))
                    correct[row] += np.bincount(edge[values["correct"]], minlength=len(edges))
        return Sums(edges, loss.cumsum(1), correct.cumsum(1))


def open_parts(
    folder: Path, loaded: LoadedModel, weights: str, texts: Texts, *, batch: int, segment: int
) -> Parts:
    """The raw results of a model on some sequences, those of an earlier run included.

    Args:
        folder: of the raw results of all models and datasets.
        loaded: the model.
        weights: its `fingerprint`.
        texts: the sequences.
        batch: sequences read together, a part.
        segment: tokens of a sequence read at a time.

    Raises:
        DataError: the folder there belongs to other weights or sequences.
    """
    weight = loaded.model.tok_embeddings.weight
    about = {
        "version": VERSION,
        "weights": weights,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "texts": texts.about["sha256"],
        "sequences": texts.sequences,
        "length": texts.length,
        "batch": batch,
        "segment": segment,
    }
    target = folder / f"{slug(loaded.label)}-{slug(texts.about['wanted']['data'])}-{digest(about)}"
    path = target / "about.json"
    if path.exists():
        found = read_parts(target).about
        wrong = [f"{key} {found.get(key)!r}, not {value!r}" for key, value in about.items() if found.get(key) != value]
        if wrong:
            raise DataError(f"{target} is of another evaluation: {'; '.join(wrong)}\ndelete it, or use another --out")
    else:
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(about, indent=1) + "\n")
    return Parts(target, about)


def read_parts(folder: Path) -> Parts:
    """A folder of raw results, whatever it belongs to.

    Raises:
        DataError: it is not one.
    """
    try:
        about = json.loads((folder / "about.json").read_text())
        parts = Parts(folder, about)
        if about["version"] != VERSION or not parts.all or about["length"] < 1:
            raise ValueError(f"version {about['version']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} does not hold raw results of length_extrapolation ({error!r})") from None
    return parts


def fingerprint(model: DeltaProductLM) -> str:
    """Checksum of the architecture and of every weight in the dtype it has."""
    hasher = hashlib.sha256(json.dumps(asdict(model.args), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return hasher.hexdigest()

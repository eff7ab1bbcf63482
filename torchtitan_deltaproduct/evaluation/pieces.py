"""The arrays that were measured, on disk, a file a piece: a batch of sequences of one model on one dataset.

    pieces = Pieces.open(folder, loaded, fingerprint(loaded.model), texts, {"batch": 4, "segment": 1024}, ".npy", 1)
    for piece in pieces.missing(): write_array(pieces.path(piece), ...)
    for (first, last), arrays in pieces: ...

    FOLDER/MODEL-DATA-KEY/about.json          what they belong to: weights, sequences, how they are read
                         /00000-00003.npy     arrays of the sequences 0 to 3

A file has its name once it is complete, so a killed evaluation continues with those that are missing. What it holds
depends on about.json alone, not on who computed it when, to the last bit on the same kind of device and with the same
number of threads. KEY is drawn from it: another model, or other sequences, have another folder.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from torchtitan_deltaproduct.arguments import shown
from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.files import read_text
from torchtitan_deltaproduct.models import DeltaProductLM

from .files import DAMAGE, digest, slug, write_json

Arrays = np.ndarray | dict[str, np.ndarray]


class Sequences(Protocol):
    """Tokens to read: `texts.Texts`, or generated words.

    `about` has wanted (data), sha256 and eos_id: of the token that begins a document; None: each sequence is one.
    """

    about: dict
    length: int
    sequences: int

    def read(self, first: int, last: int, start: int, stop: int) -> np.ndarray: ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Tokens:
    """The sequences first .. last - 1 of some, which one piece measures."""

    sequences: Sequences
    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first

    @property
    def length(self) -> int:
        """Tokens that are read of each; one more is there for the last prediction, unless they are words."""
        return self.sequences.length

    def read(self, start: int, stop: int, rows: slice = slice(None)) -> np.ndarray:
        """Tokens [start, stop) of each sequence, or of some: [B, stop - start] int64."""
        first, last, _ = rows.indices(self.count)
        return self.sequences.read(self.first + first, self.first + last, start, stop)


@dataclass(frozen=True)
class Pieces:
    """The arrays of one model on one set of sequences, in files that end with `suffix`, `.npy` or `.npz`.

    `about`, in about.json: version, weights, dtype, device, texts, sequences, length, batch, segment, ...
    """

    folder: Path
    about: dict
    suffix: str

    @classmethod
    def open(
        cls, folder: Path, loaded: LoadedModel, weights: str, sequences: Sequences, reading: dict, suffix: str,
        version: int,
    ) -> "Pieces":  # fmt: skip
        """The pieces of a model on some sequences, in `folder` with all others.

        `weights` is the model's fingerprint; `reading` says how sequences are read: `batch`, those of a piece, and
        whatever else changes what is measured. `version` is that of the content of the files.
        """
        weight = loaded.model.tok_embeddings.weight
        about = {
            "version": version, "weights": weights, "dtype": str(weight.dtype).removeprefix("torch."),
            "device": weight.device.type, "texts": sequences.about["sha256"], "sequences": sequences.sequences,
            "length": sequences.length, **reading,
        }  # fmt: skip
        target = folder / f"{slug(loaded.label)}-{slug(sequences.about['wanted']['data'])}-{digest(about)}"
        if not (target / "about.json").exists():
            target.mkdir(parents=True, exist_ok=True)
            write_json(target / "about.json", about)
        return cls.at(target, suffix, version)

    @classmethod
    def at(cls, folder: Path, suffix: str, version: int) -> "Pieces":
        """A folder of measurements, whatever it belongs to; DataError if it is not one."""
        try:
            pieces = cls(folder, json.loads(read_text(folder / "about.json")), suffix)
            if pieces.about["version"] != version or not pieces.all or pieces.about["length"] < 1:
                raise ValueError(f"version {pieces.about['version']}")
        except DAMAGE as error:
            raise DataError(f"{folder} does not hold measurements of this eval ({error!r})") from None
        return pieces

    @property
    def all(self) -> list[tuple[int, int]]:
        """(first, last) of each piece, which has the sequences first .. last - 1."""
        sequences, batch = self.about["sequences"], self.about["batch"]
        return [(first, min(first + batch, sequences)) for first in range(0, sequences, batch)]

    def path(self, piece: tuple[int, int]) -> Path:
        return self.folder / f"{piece[0]:05d}-{piece[1] - 1:05d}{self.suffix}"

    def missing(self) -> list[tuple[int, int]]:
        """Pieces to compute; DataError if one that is there has been damaged since it was written."""
        return [piece for piece in self.all if not self.path(piece).exists() or self.arrays(piece) is None]

    def arrays(self, piece: tuple[int, int]) -> Arrays:
        """What was measured; DataError if the file is not there, or damaged."""
        file = self.path(piece)
        try:
            content = np.load(file)
            if isinstance(content, np.ndarray):
                if content.shape != (piece[1] - piece[0], self.about["length"]):
                    raise ValueError(f"it holds {content.dtype} {list(content.shape)}")
                return content
            with content:
                return dict(content)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{file} is damaged ({error})\ndelete it: the same command measures it again") from None

    def __iter__(self) -> Iterator[tuple[tuple[int, int], Arrays]]:
        return ((piece, self.arrays(piece)) for piece in self.all)

    def tidy(self) -> None:
        """Removes what killed runs left behind; for when no piece is missing."""
        for leftover in self.folder.glob(f"*{self.suffix}.tmp*"):
            leftover.unlink(missing_ok=True)


@dataclass(frozen=True)
class Measured:
    """One model on one dataset.

    Attributes:
        model: what results say of it: name (short), label, path, step, train_length, num_householder, ...
        data: what they say of the dataset: name (short), said (one line), and what the sequences say of themselves.
        pieces: the arrays.
        loaded, sequences: the model itself and what it reads; None of an earlier run.
    """

    model: dict
    data: dict
    pieces: Pieces
    loaded: LoadedModel | None = field(default=None, repr=False)
    sequences: Sequences | None = None

    @property
    def name(self) -> str:
        return f"{self.model['name']}, {self.data['name']}"

    @property
    def length(self) -> int:
        return self.pieces.about["length"]

    def tokens(self, piece: tuple[int, int]) -> int:
        """Tokens of a piece."""
        return (piece[1] - piece[0]) * self.length


def describe(loaded: LoadedModel, name: str, weights: str) -> dict[str, Any]:
    """What results say of a model; `weights` is its `fingerprint`."""
    args = loaded.model.args
    return {
        "name": name, "label": shown(loaded.label), "path": str(loaded.run), "step": loaded.step,
        "train_length": loaded.train_length, "num_householder": args.num_householder,
        "head_dim": args.head_dim, "head_v_dim": args.head_v_dim, "allow_neg_eigval": args.allow_neg_eigval,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()), "weights": weights,
    }  # fmt: skip


def fingerprint(model: DeltaProductLM) -> str:
    """Checksum of the architecture and of every weight in the dtype it has."""
    hasher = hashlib.sha256(json.dumps(asdict(model.args), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return hasher.hexdigest()

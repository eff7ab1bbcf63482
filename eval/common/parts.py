"""Measurements on disk, a file for each batch of sequences: what the evals of long sequences share.

    class Losses(Parts): suffix = ".npy"; ...
    parts = Losses.open(folder, loaded, fingerprint(loaded.model), texts, {"batch": 4, "segment": 1024})
    for part in parts.missing(): parts.compute(part, loaded.model, texts)

    FOLDER/MODEL-DATA-KEY/about.json          what it belongs to: weights, sequences, how they are read
                         /00000-00003.npy     sequences 0 to 3

A file has its name once it is complete, so a killed eval continues with those that are missing. What a part holds
depends on `about.json` alone, not on who computed it when, to the last bit on the same kind of device and with the
same number of threads. KEY is drawn from it: another model, or other sequences, have another folder.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Protocol, Self

import numpy as np
import torch

from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.data.manifest import write_atomically
from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.files import read_text
from torchtitan_deltaproduct.models import DeltaProductLM

from .texts import digest, slug

Part = tuple[int, int]
"""Sequences first .. last - 1."""


class Sequences(Protocol):
    """Tokens to read: `texts.Texts`, or generated words. `about` has wanted (data), sha256 and eos_id (or None)."""

    about: dict
    length: int
    sequences: int

    def read(self, first: int, last: int, start: int, stop: int) -> np.ndarray: ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Parts:
    """A folder of measurements of one model on one set of sequences.

    Attributes:
        folder: with about.json.
        about: what it belongs to; see `open`.
    """

    folder: Path
    about: dict

    suffix: ClassVar[str]
    """Of a file of measurements."""
    version: ClassVar[int]
    """Of its content."""

    @classmethod
    def open(cls, folder: Path, loaded: LoadedModel, weights: str, texts: Sequences, reading: dict) -> Self:
        """The measurements of a model on some sequences, those of an earlier run included.

        Args:
            folder: of the measurements of all models and datasets.
            loaded: the model.
            weights: its `fingerprint`.
            texts: the sequences.
            reading: how they are read: `batch`, the sequences of a part, and whatever else changes what is found.

        Raises:
            DataError: the folder there belongs to something else.
        """
        weight = loaded.model.tok_embeddings.weight
        about = {
            "version": cls.version,
            "weights": weights,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": weight.device.type,
            "texts": texts.about["sha256"],
            "sequences": texts.sequences,
            "length": texts.length,
            **reading,
        }
        target = folder / f"{slug(loaded.label)}-{slug(texts.about['wanted']['data'])}-{digest(about)}"
        if (target / "about.json").exists():
            found = cls.at(target).about
            differ = [key for key, value in about.items() if found.get(key) != value]
            wrong = [f"{key} {found.get(key)!r}, not {about[key]!r}" for key in differ]
            if wrong:
                raise DataError(
                    f"{target} is of another evaluation: {'; '.join(wrong)}\ndelete it, or use another --out"
                )
        else:
            target.mkdir(parents=True, exist_ok=True)
            write_atomically(target / "about.json", json.dumps(about, indent=1) + "\n")
        return cls(target, about)

    @classmethod
    def at(cls, folder: Path) -> Self:
        """A folder of measurements, whatever it belongs to.

        Raises:
            DataError: it is not one.
        """
        try:
            about = json.loads(read_text(folder / "about.json"))
            parts = cls(folder, about)
            if about["version"] != cls.version or not parts.all or about["length"] < 1:
                raise ValueError(f"version {about['version']}")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{folder} does not hold measurements of this eval ({error!r})") from None
        return parts

    @property
    def all(self) -> list[Part]:
        sequences, batch = self.about["sequences"], self.about["batch"]
        return [(first, min(first + batch, sequences)) for first in range(0, sequences, batch)]

    def path(self, part: Part) -> Path:
        return self.folder / f"{part[0]:05d}-{part[1] - 1:05d}{self.suffix}"

    def missing(self) -> list[Part]:
        """Parts to compute.

        Raises:
            DataError: one that is there has been damaged since it was written.
        """
        return [part for part in self.all if not self.path(part).exists() or not self.checked(part)]

    def checked(self, part: Part) -> object:
        """The file of a part, opened; DataError if it is damaged."""
        raise NotImplementedError

    def compute(
        self, part: Part, model: DeltaProductLM, texts: Sequences, progress: Callable[[int], None] | None = None
    ) -> None:
        """Measures the sequences of a part; `progress` is told the tokens after each segment."""
        raise NotImplementedError

    def tidy(self) -> None:
        """Removes what killed runs left behind; for when no part is missing."""
        for path in self.folder.glob(f"*{self.suffix}.tmp*"):
            path.unlink(missing_ok=True)


def fingerprint(model: DeltaProductLM) -> str:
    """Checksum of the architecture and of every weight in the dtype it has."""
    hasher = hashlib.sha256(json.dumps(asdict(model.args), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return hasher.hexdigest()

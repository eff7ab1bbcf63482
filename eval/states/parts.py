"""Effective ranks and transitions of a model on some sequences, measured and kept on disk, a file a batch of sequences.

    found = Measurements.open(folder, loaded, fingerprint(loaded.model), texts, asdict(Reading(every=16, batch=4)))
    for part in found.missing(): found.compute(part, loaded.model, texts)
    numbers = found.numbers()

A file holds the ranks, document starts and counts of some sequences; `common.parts` says how files are kept.
"""

import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch

from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.models.args import DeltaProductArgs
from torchtitan_deltaproduct.models.decode import init_cache

from ..common.parts import Part, Parts, Sequences
from .singular_values import effective_rank
from .states import Glimpse, walk
from .transitions import Tally


@dataclass(frozen=True)
class Reading:
    """How sequences are read.

    Attributes:
        every: a state at each multiple of so many tokens.
        between: after each Householder step of a chosen token; else after the last.
        reset: an empty state at each document start.
        batch: sequences read together, a part.
        segment: tokens of a sequence read at a time.
    """

    every: int = 16
    between: bool = False
    reset: bool = False
    batch: int = 4
    segment: int = 1024


@dataclass
class Numbers:
    """What is measured; L layers, H heads, N sequences, P positions, n Householders.

    Attributes:
        rank: [L, H, N, P, n or 1] float32, effective rank after each micro-step (or the last) of the chosen tokens.
        starts: [D, 2] int64 (sequence, tokens before the document), the start of each sequence left out.
        tally: counts over all sequences.
    """

    rank: np.ndarray
    starts: np.ndarray
    tally: Tally


class Measurement:
    """The states of one part, as they come by."""

    def __init__(self, args: DeltaProductArgs, sequences: int, length: int, reading: Reading):
        self.reading, self.top = reading, 2.0 if args.allow_neg_eigval else 1.0
        micro = args.num_householder if reading.between else 1
        shape = (args.num_hidden_layers, args.num_heads, sequences, length // reading.every, micro)
        self.rank = np.full(shape, np.nan, dtype=np.float32)
        self.tally = Tally.empty(args)
        self.rows, self.start = slice(0, sequences), 0

    def look(self, glimpse: Glimpse) -> None:
        """Measures what one layer did with the sequences `rows` from token `start` on."""
        self.tally.add(glimpse, self.top)
        first = self.start // self.reading.every
        for states in glimpse.states(self.reading.between):
            # [p, n, B, H] -> [H, B, p, n]
            found = effective_rank(states).permute(3, 2, 0, 1).float().cpu().numpy()
            self.rank[glimpse.layer][:, self.rows, first : first + found.shape[2]] = found
            first += found.shape[2]


def measure(
    model: DeltaProductLM,
    read: Callable[[slice, int, int], np.ndarray],
    sequences: int,
    length: int,
    eos_id: int | None,
    reading: Reading,
    progress: Callable[[int], None] | None = None,
) -> Numbers:
    """Reads sequences and measures their states.

    Args:
        model: whole on its device.
        read: tokens [start, stop) of the sequences of a slice: [B, stop - start].
        sequences: B.
        length: tokens of each.
        eos_id: the token that begins a document (`data.packing`); None: each sequence is one.
        reading: how; with `reset` a sequence is read by itself.
        progress: told the number of tokens after each segment.
    """
    device, found = model.tok_embeddings.weight.device, Measurement(model.args, sequences, length, reading)
    starts = []
    rows = [slice(row, row + 1) for row in range(sequences)] if reading.reset else [slice(0, sequences)]
    for found.rows in rows:
        cache = None
        for start in range(0, length, reading.segment):
            tokens = read(found.rows, start, min(start + reading.segment, length))
            begins = _begins(tokens, start, eos_id)
            starts.append(begins + [found.rows.start, start])
            for first, last, fresh in _pieces(tokens.shape[1], begins, reading.reset):
                found.start = start + first
                if cache is None or fresh:
                    cache = init_cache(model, len(tokens))
                piece = torch.from_numpy(tokens[:, first:last]).to(device)
                cache = walk(model, piece, cache, found.look, reading.every, found.start % reading.every)
            if progress:
                progress(tokens.size)
    return Numbers(found.rank, _sorted(np.concatenate(starts)), found.tally)


def _begins(tokens: np.ndarray, start: int, eos_id: int | None) -> np.ndarray:
    """(row, column) of the document starts in [B, T] tokens: [d, 2]."""
    begins = np.argwhere(tokens == eos_id) if eos_id is not None else np.empty((0, 2), dtype=np.int64)
    return begins if start else begins[begins[:, 1] > 0]


def _pieces(length: int, begins: np.ndarray, reset: bool) -> Iterator[tuple[int, int, bool]]:
    """(first, last, empty state) of the stretches of a segment that are read at once."""
    cuts = begins[:, 1].tolist() if reset else []
    for first, last in zip([0, *cuts], [*cuts, length], strict=True):
        if last > first:
            yield first, last, first in cuts


def _sorted(starts: np.ndarray) -> np.ndarray:
    return starts[np.lexsort((starts[:, 1], starts[:, 0]))]


class Measurements(Parts):
    """Measurements of one model on one set of sequences."""

    suffix, version = ".npz", 1

    @property
    def reading(self) -> Reading:
        return Reading(**{field.name: self.about[field.name] for field in fields(Reading)})

    def compute(
        self, part: Part, model: DeltaProductLM, texts: Sequences, progress: Callable[[int], None] | None = None
    ) -> None:
        """Measures the sequences of a part; `progress` is told the tokens after each segment."""
        first, last = part

        def read(rows: slice, start: int, stop: int) -> np.ndarray:
            return texts.read(first + rows.start, first + rows.stop, start, stop)

        eos_id = texts.about["eos_id"]
        found = measure(model, read, last - first, texts.length, eos_id, self.reading, progress)
        content = {"rank": found.rank, "starts": found.starts + [first, 0], **vars(found.tally)}
        temporary = self.folder / f"{self.path(part).name}.tmp{os.getpid()}"
        with open(temporary, "wb") as file:
            np.savez(file, **content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path(part))

    def checked(self, part: Part) -> Numbers:
        path = self.path(part)
        try:
            with np.load(path) as file:
                tally = Tally(**{field.name: file[field.name] for field in fields(Tally)})
                found = Numbers(file["rank"], file["starts"], tally)
            if found.rank.shape[2:4] != (part[1] - part[0], self.about["length"] // self.about["every"]):
                raise ValueError(f"ranks {list(found.rank.shape)}")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is damaged ({error})\ndelete it: the same command measures it again") from None
        return found

    def numbers(self) -> Numbers:
        """All parts together.

        Raises:
            DataError: one is damaged.
        """
        found = [self.checked(part) for part in self.all]
        tally = found[0].tally
        for other in found[1:]:
            tally += other.tally
        rank = np.concatenate([numbers.rank for numbers in found], 2)
        return Numbers(rank, np.concatenate([numbers.starts for numbers in found]), tally)

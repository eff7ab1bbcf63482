"""The training loader: samples of this rank, micro-batch after micro-batch, forever, from any position.

    loader = Loader(source, Geometry(seq_len=2048, local_batch_size=8, global_batch_size=64, dp_world_size=2))
    for inputs, labels in loader: ...         # {"input": [8, 2048] int64}, [8, 2048] int64
    loader.state_dict()                       # {"version": 1, "sample": 64, ...}: the same on every rank

Global batch s is samples [s * GB, (s+1) * GB) and is the same for any number of ranks: ranks and
micro-batches only cut it into slices. The state is the index of the next sample, so a run may continue on
other ranks or workers.
"""

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from torchtitan_deltaproduct.errors import ConfigError, DataError

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
STATE_VERSION = 1


@dataclass(frozen=True)
class Geometry:
    """How samples are cut into batches; `seq_len` in tokens, batch sizes in samples."""

    seq_len: int
    local_batch_size: int
    global_batch_size: int
    dp_rank: int = 0
    dp_world_size: int = 1

    def __post_init__(self):
        if self.seq_len < 1 or self.local_batch_size < 1:
            raise ConfigError(
                f"training.seq_len = {self.seq_len} and training.local_batch_size = {self.local_batch_size}: "
                "both must be at least 1"
            )
        if self.global_batch_size < 1 or self.global_batch_size % self.micro_batch:
            raise ConfigError(
                f"training.global_batch_size = {self.global_batch_size} is not a multiple of local_batch_size x "
                f"data-parallel ranks = {self.local_batch_size} x {self.dp_world_size} = {self.micro_batch}"
            )

    @property
    def micro_batch(self) -> int:
        """Samples of one micro-batch on all ranks."""
        return self.local_batch_size * self.dp_world_size

    def rows(self, sample: int) -> np.ndarray:
        """Global indices of this rank's samples of the micro-batch at `sample`: [local_batch_size] int64."""
        first = sample + self.dp_rank * self.local_batch_size
        return np.arange(first, first + self.local_batch_size)


class Source(Protocol):
    """A kind of data whose samples can be read in any order. Instances are picklable."""

    vocab_size: int
    tokenizer_path: str
    """Folder with tokenizer.json; empty for data without a tokenizer."""

    def batch(self, samples: np.ndarray) -> Batch:
        """samples: [n] int64 global sample indices -> ({"input": [n, T] int64, ...}, labels [n, T] int64)."""

    def order(self) -> dict[str, object]:
        """All that decides which tokens sample i has: JSON values under names a user knows from the TOML."""

    def epochs(self, sample: int) -> dict[str, float]:
        """Passes made over each part of the data by the samples before `sample`; 0 of endless data."""

    def describe(self) -> str:
        """One line for the log."""


class _MicroBatches(torch.utils.data.Dataset):
    """Maps the first sample of a micro-batch to this rank's part of it."""

    def __init__(self, source: Source, geometry: Geometry):
        self.source, self.geometry = source, geometry

    def __getitem__(self, sample: int) -> Batch:
        return self.source.batch(self.geometry.rows(sample))


def ignore_stop_signals(*_) -> None:
    """For processes that read ahead: a cluster signals every process of a job, and only the rank is to act on it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _as_is(item):
    return item


class Loader:
    """Micro-batches of one rank; `num_workers` processes read `prefetch_factor` of them ahead, the same ones."""

    def __init__(self, source: Source, geometry: Geometry, num_workers: int = 0, prefetch_factor: int = 2):
        self.source, self.geometry = source, geometry
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor
        self.sample = 0
        """Global index of the next sample to be handed out, of all ranks."""

    def __iter__(self) -> Iterator[Batch]:
        """Goes on from the current position. Only what was handed out counts, not what workers read ahead."""
        positions = count(self.sample, self.geometry.micro_batch)
        for item in self._wrap(_MicroBatches(self.source, self.geometry), sampler=positions):
            self.sample += self.geometry.micro_batch
            yield item

    def _wrap(self, dataset: torch.utils.data.Dataset, **options) -> DataLoader:
        if self.num_workers:
            options |= {"prefetch_factor": self.prefetch_factor, "worker_init_fn": ignore_stop_signals}
        # A generator of its own: a loader made anew on restart must not draw from the global one.
        options |= {"num_workers": self.num_workers, "generator": torch.Generator()}
        return DataLoader(dataset, batch_size=None, collate_fn=_as_is, **options)

    def epochs(self) -> dict[str, float]:
        """Passes over each part of the data so far, fractions included."""
        return self.source.epochs(self.sample)

    def describe(self) -> str:
        """One line for the log: what is read, and how many steps an epoch has if it has any."""
        steps = 1000
        passes = self.source.epochs(steps * self.geometry.global_batch_size).values()
        if not any(passes):
            return f"{self.source.describe()}; steps of {self._step()}"
        lengths = " / ".join(f"{steps / n:,.0f}" for n in passes)
        return f"{self.source.describe()}; an epoch is {lengths} steps of {self._step()}"

    def _step(self) -> str:
        samples, seq_len = self.geometry.global_batch_size, self.geometry.seq_len
        return f"{samples:,} x {seq_len:,} = {samples * seq_len:,} tokens"

    def state_dict(self) -> dict[str, int | str]:
        """The position, equal on all ranks; `order` says of what, so that other data is not taken for it."""
        order = json.dumps(self.source.order(), sort_keys=True)
        return {"version": STATE_VERSION, "sample": self.sample, "order": order}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Goes to a saved position; iterate anew afterwards.

        Raises:
            DataError: the position is one of other data, or was saved by another version.
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(
                f"The checkpoint's data position has version {state.get('version')}; "
                f"this program reads {STATE_VERSION}.\nContinue with the release that wrote it, "
                "or start a new run from its weights (checkpoint.initial_load_path)."
            )
        saved, here = json.loads(str(state["order"])), self.source.order()
        changed = sorted(key for key in saved.keys() | here.keys() if saved.get(key) != here.get(key))
        if changed:
            changes = "; ".join(f"{key}: was {saved.get(key)}, is {here.get(key)}" for key in changed)
            raise DataError(
                f"The checkpoint was trained on another sequence of samples ({changes}).\n"
                "Restore these settings, or start a new run from its weights (checkpoint.initial_load_path)."
            )
        self.sample = int(state["sample"])

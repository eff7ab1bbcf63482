"""Held-out data: the same samples in the same order at every pass, each once, in equally many batches on every rank.

held_out = held_out_text(["data/code/validation"], seq_len=2048, local_batch_size=8)       # all of its windows
held_out = held_out_sequences(config.data, seq_len=512, local_batch_size=64, samples=2048, split="test")
for inputs, labels in held_out: ...            # one pass; a rank that runs out gets rows whose labels are all -100
"""

from collections.abc import Iterator

import numpy as np

from torchtitan_deltaproduct.errors import ConfigError

from .generated.group_words import GroupWordSource
from .generated.languages import FormalSource
from .loader import Batch
from .packing import IGNORE
from .shards.held_out_windows import HeldOutWindows
from .shards.prepared import open_streams


class HeldOut:
    """Samples 0 .. samples - 1 of a source, cut into batches for this rank.

    Args:
        source: makes the samples; what is particular to it (`token_bytes`, `classes`, `chance`) is asked of it.
        samples: of all ranks together; the same for any number of ranks, which share them.
        local_batch_size: samples of one batch on this rank.
        dp_rank: index of this rank, of `dp_world_size`.

    Raises:
        ConfigError: there is nothing to read.
    """

    def __init__(
        self,
        source: GroupWordSource | FormalSource | HeldOutWindows,
        samples: int,
        local_batch_size: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
    ):
        if samples < 1 or local_batch_size < 1:
            raise ConfigError(
                f"validation of {samples} samples in batches of {local_batch_size}: both must be at least 1"
            )
        self.source, self.samples, self.local_batch_size = source, samples, local_batch_size
        self.dp_rank, self.dp_world_size = dp_rank, dp_world_size

    def __len__(self) -> int:
        """Batches of one pass; the same on every rank."""
        return -(-self.samples // (self.local_batch_size * self.dp_world_size))

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            first = (step * self.dp_world_size + self.dp_rank) * self.local_batch_size
            rows = np.arange(first, first + self.local_batch_size)
            inputs, labels = self.source.batch(np.minimum(rows, self.samples - 1))
            labels[max(0, self.samples - first) :] = IGNORE
            yield inputs, labels

    def describe(self) -> str:
        """One line for the log."""
        return f"{self.source.split} data: {self.samples:,} samples in {len(self):,} steps; {self.source.describe()}"


def held_out_text(
    paths: list[str],
    *,
    seq_len: int,
    local_batch_size: int,
    steps: int = -1,
    dp_rank: int = 0,
    dp_world_size: int = 1,
    reset_state_at_documents: bool = False,
    tokenizer_path: str = "",
    eos: str = "",
) -> HeldOut:
    """The windows of prepared folders, or of token files of others.

    Args:
        paths: the folders and files, read one after the other.
        seq_len: window length in tokens; the last window of each folder may be partly ignored.
        local_batch_size: windows of one batch on this rank.
        steps: -1 reads every window once; else steps * local_batch_size windows, evenly spaced so that every
            part of every folder is represented.
        dp_rank: index of this rank, of `dp_world_size`.
        reset_state_at_documents: adds `document_starts`; as in training. It changes no label.
        tokenizer_path, eos: see `open_stream`.

    Raises:
        ConfigError: `paths` or `steps` cannot be used. DataError: a folder is missing, damaged or empty.
    """
    if steps == 0 or steps < -1:
        raise ConfigError(f"validation.steps is {steps}: expected -1 (the whole set) or at least 1")
    streams = open_streams(paths, "validation.paths", tokenizer_path, eos)
    source = HeldOutWindows(streams, seq_len, reset_state_at_documents, max(0, steps * local_batch_size))
    return HeldOut(source, source.samples, local_batch_size, dp_rank, dp_world_size)


def held_out_sequences(
    data,
    *,
    seq_len: int,
    local_batch_size: int,
    samples: int,
    split: str = "validation",
    dp_rank: int = 0,
    dp_world_size: int = 1,
    min_length: int | None = None,
    max_length: int | None = None,
) -> HeldOut:
    """The generated sequences of one length that belong to a `[data]` table.

    Args:
        data: the `[data]` table; a curriculum plays no part here.
        seq_len: tokens of a row; may be longer than in training.
        local_batch_size: rows of one batch on this rank.
        samples: rows of all ranks together.
        split: `validation` or `test`.
        dp_rank: index of this rank, of `dp_world_size`.
        min_length: formal languages: fewest tokens of a row, in place of `data.min_length`.
        max_length: formal languages: most tokens of a row, in place of `data.max_length`.

    Raises:
        ConfigError: `data.kind` is not generated, or the settings cannot be run.
    """
    if split == "train":
        raise ConfigError('the stream "train" is what the model learns from: validate on "validation" or "test"')
    if data.kind == "group_word":
        source = GroupWordSource(data.group, seq_len, data.seed, split)
    elif data.kind == "formal_language":
        low = data.min_length if min_length is None else min_length
        high = data.max_length if max_length is None else max_length
        source = FormalSource(data.language, seq_len, low, high, data.seed, split)
    else:
        raise ConfigError(f'data.kind is {data.kind!r}: only "group_word" and "formal_language" are generated')
    return HeldOut(source, samples, local_batch_size, dp_rank, dp_world_size)


def held_out_lengths(data, *, seq_len: int, lengths: list[int], **options) -> dict[int, HeldOut]:
    """The generated sequences of a run: at the length of training, key 0, and at each of `lengths`, in tokens.

    A formal language has rows as in training under key 0, and rows of `data.max_length` to L tokens under key L (the
    setting of Grazzi et al. 2025: trained on 3 to 40, tested on 40 to 256). Options and errors: `held_out_sequences`.
    """
    sets = {0: held_out_sequences(data, seq_len=seq_len, **options)}
    for length in lengths:
        ends = {"min_length": data.max_length, "max_length": length} if data.kind == "formal_language" else {}
        sets[length] = held_out_sequences(data, seq_len=length, **ends, **options)
    return sets

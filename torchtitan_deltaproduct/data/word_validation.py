"""Held-out samples of generated data: the same ones at every pass, cut into equal batches for the ranks.

    loader = build_word_validation(config.data, seq_len=512, local_batch_size=64, samples=2048, split="test")
    for inputs, labels in loader: ...          # then stops; loader.classes, loader.chance for the metrics

Samples 0 .. samples - 1 of the stream `validation` or `test`, whatever the number of ranks. All ranks get the
same number of batches; a rank that runs out gets rows whose labels are all -100.
"""

import hashlib
import json
from collections.abc import Iterator

import numpy as np

from torchtitan_deltaproduct.errors import ConfigError

from .generated.group_words import GroupWordSource
from .generated.languages import FormalSource
from .loader import Batch
from .packing import IGNORE


def build_word_validation(
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
) -> "WordValidation":
    """The held-out samples of one length that belong to a `[data]` table.

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
    return WordValidation(source, local_batch_size, samples, dp_rank, dp_world_size)


def build_word_validations(
    data,
    *,
    seq_len: int,
    lengths: list[int],
    local_batch_size: int,
    samples: int,
    dp_rank: int = 0,
    dp_world_size: int = 1,
) -> dict[int, "WordValidation"]:
    """The held-out samples of a run: at the length of training, key 0, and at each of `lengths`, in tokens.

    A formal language has rows as in training under key 0, and rows of `data.max_length` to L tokens under key L (the
    setting of Grazzi et al. 2025: trained on 3 to 40, tested on 40 to 256). Other arguments and errors:
    `build_word_validation`.
    """
    common = {
        "local_batch_size": local_batch_size,
        "samples": samples,
        "dp_rank": dp_rank,
        "dp_world_size": dp_world_size,
    }
    found = {0: build_word_validation(data, seq_len=seq_len, **common)}
    for length in lengths:
        ends = {"min_length": data.max_length, "max_length": length} if data.kind == "formal_language" else {}
        found[length] = build_word_validation(data, seq_len=length, **ends, **common)
    return found


class WordValidation:
    """Batches of one rank; see `build_word_validation`.

    Attributes:
        source: makes the samples.
        samples: rows of all ranks together.
        steps: batches of one pass, on every rank.
    """

    tokenizer_path = ""

    def __init__(
        self,
        source: GroupWordSource | FormalSource,
        local_batch_size: int,
        samples: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
    ):
        if samples < 1 or local_batch_size < 1:
            raise ConfigError(
                f"validation of {samples} samples in batches of {local_batch_size}: both must be at least 1"
            )
        self.source, self.samples, self.local_batch_size = source, samples, local_batch_size
        self.dp_rank, self.dp_world_size = dp_rank, dp_world_size
        self.steps = -(-samples // (local_batch_size * dp_world_size))

    @property
    def seq_len(self) -> int:
        """Tokens of a row."""
        return self.source.seq_len

    @property
    def vocab_size(self) -> int:
        """Input tokens."""
        return self.source.vocab_size

    @property
    def classes(self) -> int:
        """Labels are below this."""
        return self.source.classes

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return self.source.chance

    def __len__(self) -> int:
        """Batches of one pass; the same on every rank."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.steps):
            first = (step * self.dp_world_size + self.dp_rank) * self.local_batch_size
            inputs, labels = self.source.batch(np.arange(first, first + self.local_batch_size))
            labels[max(0, self.samples - first) :] = IGNORE
            yield inputs, labels

    def fingerprint(self) -> str:
        """Changes whenever the samples would."""
        parts = json.dumps([self.source.order(), self.samples], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One line for the log."""
        return f"{self.source.split} data: {self.samples:,} samples in {self.steps:,} steps; {self.source.describe()}"

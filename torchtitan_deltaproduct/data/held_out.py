"""Held-out data: the same samples in the same order at every pass, each once, in equally many batches on every rank.

held_out = held_out_text(["data/code/validation"], seq_len=2048, local_batch_size=8)       # all of its windows
held_out = held_out_sequences(config.data, seq_len=512, local_batch_size=64, samples=2048, split="test")
for inputs, labels in held_out: ...            # one pass; a rank that runs out gets rows whose labels are all -100
bits = nats.sum() / math.log(2) / held_out.source.token_bytes[labels[labels != -100]].sum()
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch

from torchtitan_deltaproduct.errors import ConfigError, DataError

from .generated.group_words import GroupWordSource
from .generated.languages import FormalSource
from .loader import Batch
from .packing import IGNORE
from .shards.prepared import Windows, open_streams
from .shards.shards import TokenStream
from .text.tokenizer import token_bytes

COUNTED = 1 << 22
"""Tokens counted at a time."""


def count_tokens(stream: TokenStream) -> np.ndarray:
    """How often each id occurs: [vocab_size] int64."""
    counts = np.zeros(stream.manifest.vocab_size, dtype=np.int64)
    for first in range(0, stream.tokens, COUNTED):
        piece = np.empty(min(COUNTED, stream.tokens - first), dtype=np.int64)
        stream.read(first, piece)
        counts += np.bincount(piece, minlength=len(counts))
    return counts


class HeldOutWindows(Windows):
    """`samples` windows, at most `most` (0: all), spread over all streams; the last of each may be partly padding."""

    split = "validation"

    def __init__(self, streams: list[TokenStream], seq_len: int, reset: bool, most: int = 0):
        super().__init__(streams, [-(-stream.tokens // seq_len) for stream in streams], seq_len, reset)
        total = int(self.bounds[-1])
        if not total:
            raise DataError(f"{streams[0].folder} holds no tokens.\nPrepare a validation set that is not empty.")
        self.samples = min(most, total) or total

    def batch(self, samples: np.ndarray) -> Batch:
        """samples: [n] int64 below `samples` -> ({"input": [n, T] int64, "document_starts": [n, T] bool}, labels)."""
        return self.read(samples * self.bounds[-1] // self.samples)

    @cached_property
    def token_bytes(self) -> torch.Tensor:
        """UTF-8 bytes of text that each token stands for, 0 for the separator: [vocab_size] float64.

        The table of `tokenizer.token_bytes`, scaled so that all tokens of the set have the bytes of its text. The
        factor is 1 for byte-level vocabularies. Where the tokenizer changes the text (Unicode normalisation, unknown
        tokens, a space before each document) it is not, and only the manifests know the bytes that were read: those
        of files that other programs made do not, and the table stays as it is.
        """
        eos_id = self.streams[0].manifest.eos_id
        table = token_bytes(self.tokenizer_path, self.vocab_size, eos_id).astype(np.float64)
        if not all(stream.manifest.bytes for stream in self.streams):
            return torch.from_numpy(table)
        counts = sum(count_tokens(stream) for stream in self.streams)
        if not table @ counts:
            # Nothing but unknown tokens: each has an equal share.
            table[:] = np.arange(self.vocab_size) != eos_id
        text_bytes = sum(stream.manifest.bytes for stream in self.streams)
        return torch.from_numpy(table * (text_bytes / (table @ counts)))

    def describe(self) -> str:
        tokens = sum(stream.tokens for stream in self.streams)
        names = " + ".join(str(stream.folder) for stream in self.streams)
        return f"windows of {self.seq_len:,} of {names} ({tokens:,} tokens)"


class HeldOut:
    """Samples 0 .. samples - 1 of a source, for all ranks together, cut into batches for this one; ConfigError if none.

    What is particular to a source (`token_bytes` of text, `classes` and `chance` of generated ones) is asked of it.
    """

    def __init__(self, source, samples: int, local_batch_size: int, dp_rank: int = 0, dp_world_size: int = 1):
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
    paths: list[str], *, seq_len: int, local_batch_size: int, steps: int = -1, reset_state_at_documents: bool = False,
    tokenizer_path: str = "", eos: str = "", **ranks: int,
) -> HeldOut:  # fmt: skip
    """The windows of `seq_len` tokens of what `open_stream` opens, one after the other; see `HeldOut`.

    Args:
        steps: -1 reads every window once; else steps * local_batch_size windows, evenly spaced so that every
            part of every folder is represented.
        reset_state_at_documents: adds `document_starts`; as in training. It changes no label.

    Raises:
        ConfigError: `paths` or `steps` cannot be used. DataError: a folder is missing, damaged or empty.
    """
    if steps == 0 or steps < -1:
        raise ConfigError(f"validation.steps is {steps}: expected -1 (the whole set) or at least 1")
    streams = open_streams(paths, "validation.paths", tokenizer_path, eos)
    source = HeldOutWindows(streams, seq_len, reset_state_at_documents, max(0, steps * local_batch_size))
    return HeldOut(source, source.samples, local_batch_size, **ranks)


def held_out_sequences(
    data, *, seq_len: int, local_batch_size: int, samples: int, split: str = "validation",
    min_length: int | None = None, max_length: int | None = None, **ranks: int,
) -> HeldOut:  # fmt: skip
    """The generated rows of `seq_len` tokens that belong to a `[data]` table; a curriculum plays no part.

    `min_length` and `max_length` of a formal language are in place of those in `data`; for the rest see `HeldOut`.

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
    return HeldOut(source, samples, local_batch_size, **ranks)


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

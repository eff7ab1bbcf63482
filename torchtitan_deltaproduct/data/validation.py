"""Validation data: the same windows in the same order at every pass, each token counted once.

    validation = build_validation_loader(["data/code/validation"], seq_len=2048, local_batch_size=8, steps=-1)
    for inputs, labels in validation: ...                          # the whole set, then stops
    bits = nats.sum() / math.log(2) / validation.token_bytes[labels[labels != -100]].sum()

All ranks get the same number of batches; a rank that runs out of windows gets rows whose labels are all -100.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch

from torchtitan_deltaproduct.errors import ConfigError, DataError

from .loader import Batch
from .packing import IGNORE, all_windows, read_window
from .prepared import open_streams
from .shards import TokenStream
from .tokenizer import token_bytes

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


class ValidationLoader:
    """A fixed set of windows, cut into batches for this rank.

    Args:
        paths: prepared folders, read one after the other.
        seq_len: window length in tokens; the last window of each folder may be partly ignored.
        local_batch_size: windows of one batch on this rank.
        steps: -1 reads every window once; else steps * local_batch_size windows, evenly spaced so that every
            part of every folder is represented. They are the same for any number of ranks, which share them.
        dp_rank: index of this rank, of `dp_world_size`.
        reset_state_at_documents: adds `document_starts`; as in training. It changes no label.

    Attributes:
        token_bytes: [vocab_size] float64, UTF-8 bytes of text that each token stands for; 0 for the separator.
        windows: stream and window index of each row of the global set, in order.
    """

    def __init__(
        self,
        paths: list[str],
        seq_len: int,
        local_batch_size: int,
        steps: int = -1,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        reset_state_at_documents: bool = False,
    ):
        if steps == 0 or steps < -1:
            raise ConfigError(f"validation.steps is {steps}: expected -1 (the whole set) or at least 1")
        self.streams = open_streams(paths, "validation.paths")
        self.seq_len, self.local_batch_size, self.reset = seq_len, local_batch_size, reset_state_at_documents
        self.dp_rank, self.dp_world_size = dp_rank, dp_world_size
        windows = [
            (k, w)
            for k, stream in enumerate(self.streams)
            for w in range(all_windows(stream.tokens, seq_len))
        ]
        if not windows:
            raise DataError(f"{paths[0]} holds no tokens.\nPrepare a validation set that is not empty.")
        wanted = steps * local_batch_size
        if 0 < wanted < len(windows):
            windows = [windows[i] for i in (np.arange(wanted) * len(windows) // wanted).tolist()]
        self.windows = windows
        self.steps = -(-len(windows) // (local_batch_size * dp_world_size))

    @property
    def vocab_size(self) -> int:
        return self.streams[0].manifest.vocab_size

    @property
    def tokenizer_path(self) -> str:
        return str(self.streams[0].folder / "tokenizer")

    @property
    def tokenizer_sha256(self) -> str:
        return self.streams[0].manifest.tokenizer_sha256

    @cached_property
    def token_bytes(self) -> torch.Tensor:
        """The table of `tokenizer.token_bytes`, scaled so that all tokens of the set have the bytes of its text.

        The factor is 1 for byte-level vocabularies. Where the tokenizer changes the text (Unicode normalisation,
        unknown tokens, a space before each document) it is not, and only the manifests know the bytes that were read.
        """
        table = token_bytes(self.tokenizer_path, self.vocab_size, self.streams[0].manifest.eos_id)
        counts = sum(count_tokens(stream) for stream in self.streams)
        if not table @ counts:
            # Nothing but unknown tokens: each has an equal share.
            table = np.ones_like(table)
            table[self.streams[0].manifest.eos_id] = 0
        text_bytes = sum(stream.manifest.bytes for stream in self.streams)
        return torch.from_numpy(table * (text_bytes / (table @ counts)))

    def __len__(self) -> int:
        """Batches of one pass; the same on every rank."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        shape = (self.local_batch_size, self.seq_len)
        for step in range(self.steps):
            inputs = np.full(shape, self.streams[0].manifest.eos_id, dtype=np.int64)
            labels = np.full(shape, IGNORE, dtype=np.int64)
            starts = np.zeros(shape, dtype=bool)
            starts[:, 0] = True
            first = (step * self.dp_world_size + self.dp_rank) * self.local_batch_size
            for row, (k, w) in enumerate(self.windows[first : first + self.local_batch_size]):
                read_window(self.streams[k], w, inputs[row], labels[row], starts[row])
            batch = {"input": torch.from_numpy(inputs)}
            if self.reset:
                batch["document_starts"] = torch.from_numpy(starts)
            yield batch, torch.from_numpy(labels)

    def fingerprint(self) -> str:
        """Changes whenever the windows or their tokens would."""
        content = [stream.manifest.content_sha256 for stream in self.streams]
        parts = [content, self.seq_len, len(self.windows), self.reset]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One line for the log."""
        tokens = sum(stream.tokens for stream in self.streams)
        names = " + ".join(str(stream.folder) for stream in self.streams)
        return (
            f"validation data: {names} ({tokens:,} tokens), "
            f"{len(self.windows):,} windows of {self.seq_len:,} in {self.steps:,} steps"
        )

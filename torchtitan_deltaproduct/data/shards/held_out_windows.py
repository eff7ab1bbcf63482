"""The windows of prepared folders in file order, all of them or some, and the bytes of text behind their tokens.

source = HeldOutWindows(open_streams(["data/code/validation"], "validation.paths"), seq_len=2048, reset=False, most=64)
bits = nats.sum() / math.log(2) / source.token_bytes[labels[labels != -100]].sum()
"""

from functools import cached_property

import numpy as np
import torch

from torchtitan_deltaproduct.errors import DataError

from ..loader import Batch
from ..text.tokenizer import token_bytes
from .prepared import Windows
from .shards import TokenStream

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

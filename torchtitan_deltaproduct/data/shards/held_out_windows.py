"""The windows of prepared folders in file order, all of them or some, and the bytes of text behind their tokens.

source = HeldOutWindows(open_streams(["data/code/validation"], "validation.paths"), seq_len=2048, reset=False, most=64)
bits = nats.sum() / math.log(2) / source.token_bytes[labels[labels != -100]].sum()
"""

from functools import cached_property

import numpy as np
import torch

from torchtitan_deltaproduct.errors import DataError

from ..loader import Batch
from ..packing import all_windows
from ..text.tokenizer import token_bytes
from .prepared import read_windows
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


class HeldOutWindows:
    """`samples` windows; the last of each folder may be partly padding.

    Args:
        streams: of prepared folders or token files of others, read one after the other.
        seq_len: window length in tokens.
        reset: adds `document_starts` to the batch.
        most: windows to take, evenly spaced over all folders; 0, or more than there are: all.
    """

    split = "validation"

    def __init__(self, streams: list[TokenStream], seq_len: int, reset: bool, most: int = 0):
        self.streams, self.tokenizer_path = streams, streams[0].tokenizer_path
        self.vocab_size = streams[0].manifest.vocab_size
        self.seq_len, self.reset = seq_len, reset
        self.bounds = np.cumsum([0, *(all_windows(stream.tokens, seq_len) for stream in self.streams)])
        total = int(self.bounds[-1])
        if not total:
            raise DataError(f"{streams[0].folder} holds no tokens.\nPrepare a validation set that is not empty.")
        self.samples = min(most, total) or total

    def batch(self, samples: np.ndarray) -> Batch:
        """samples: [n] int64 below `samples` -> ({"input": [n, T] int64, "document_starts": [n, T] bool}, labels)."""
        windows = samples * self.bounds[-1] // self.samples
        return read_windows(self.streams, self.bounds, windows, self.seq_len, self.reset)

    @cached_property
    def token_bytes(self) -> torch.Tensor:
        """UTF-8 bytes of text that each token stands for, 0 for the separator: [vocab_size] float64.

        The table of `tokenizer.token_bytes`, scaled so that all tokens of the set have the bytes of its text. The
        factor is 1 for byte-level vocabularies. Where the tokenizer changes the text (Unicode normalisation, unknown
        tokens, a space before each document) it is not, and only the manifests know the bytes that were read.
        """
        table = token_bytes(self.tokenizer_path, self.vocab_size, self.streams[0].manifest.eos_id)
        if not all(stream.manifest.bytes for stream in self.streams):
            # The tokens of others: how much text they were made of is not recorded.
            return torch.from_numpy(table.astype(np.float64))
        counts = sum(count_tokens(stream) for stream in self.streams)
        if not table @ counts:
            # Nothing but unknown tokens: each has an equal share.
            table = np.ones_like(table)
            table[self.streams[0].manifest.eos_id] = 0
        text_bytes = sum(stream.manifest.bytes for stream in self.streams)
        return torch.from_numpy(table * (text_bytes / (table @ counts)))

    def describe(self) -> str:
        tokens = sum(stream.tokens for stream in self.streams)
        names = " + ".join(str(stream.folder) for stream in self.streams)
        return f"windows of {self.seq_len:,} of {names} ({tokens:,} tokens)"

"""Windows of a fixed length over a stream of tokens.

The stream is `. d d d . e e .` where `.` is the separator: one stands before the first document, one after
each. With seq_len T = 3, window 0 reads `. d d d` and predicts the last three from the first three; window 1
reads `d . e e`, and so on. Every token of the stream is a label exactly once, a separator as well as the
first token of a document.

    input            .  d  d | d  .  e | e
    label            d  d  d | .  e  e | .
    document_starts  1  0  0 | 1  1  0 | 1       where the label opens a document, and at a window's start

A state that is reset at `document_starts` begins each document by reading the separator, as GPT-2 and its
evaluation do. So resetting drops no label, no label depends on another document, and losses with and without
it can be compared.
"""

from typing import Protocol

import numpy as np
import torch

IGNORE = -100
"""Label of a position that is not predicted; torch's and torchtitan's convention."""


class Stream(Protocol):
    tokens: int

    def read(self, start: int, out: np.ndarray) -> int: ...

    def document_starts(self, start: int, stop: int) -> np.ndarray: ...


def read_window(stream: Stream, window: int, inputs: np.ndarray, labels: np.ndarray, starts: np.ndarray | None) -> None:
    """Fills one row of a batch with a window of a stream.

    Args:
        inputs: [T] int64, filled with tokens; after the end of the stream with the last token.
        labels: [T] int64, filled with the tokens that follow; after the end of the stream with `IGNORE`.
        starts: [T] bool, filled with document starts, or None to leave them out.
    """
    seq_len = len(inputs)
    first = window * seq_len
    row = np.empty(seq_len + 1, dtype=np.int64)
    count = stream.read(first - 1, row)
    row[count:] = row[count - 1]
    inputs[:] = row[:-1]
    labels[:] = row[1:]
    labels[count - 1 :] = IGNORE
    if starts is not None:
        starts[:] = False
        starts[0] = True
        starts[stream.document_starts(first, first + seq_len) - first] = True


def read_windows(
    streams: list[Stream], windows: list[int], seq_len: int, reset: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch of n windows of T = `seq_len` tokens, each of one of n streams; `reset` adds `document_starts`.

    Returns:
        ({"input": [n, T] int64, "document_starts": [n, T] bool}, labels [n, T] int64).
    """
    inputs, labels = (np.empty((len(windows), seq_len), dtype=np.int64) for _ in range(2))
    starts = np.empty(inputs.shape, dtype=bool) if reset else [None] * len(windows)
    for row, (stream, window) in enumerate(zip(streams, windows, strict=True)):
        read_window(stream, window, inputs[row], labels[row], starts[row])
    batch = {"input": torch.from_numpy(inputs)}
    if reset:
        batch["document_starts"] = torch.from_numpy(starts)
    return batch, torch.from_numpy(labels)

"""The index of a Megatron corpus, `<name>.idx` beside the tokens in `<name>.bin`, little endian:

    9 bytes      MMIDIDX, 0, 0
    8 bytes      1, the version
    1 byte       the type of a token: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16 (6 and 7 are floats)
    8 bytes      S, sequences
    8 bytes      D + 1, entries of the last part
    4 * S        int32: tokens of each sequence
    8 * S        int64: where it begins in the .bin, in bytes
    8 * (D + 1)  int64: document d is the sequences [entry d, entry d + 1)

Our shards have one, with one sequence a document, so that what reads Megatron's `IndexedDataset` reads them.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from torchtitan_deltaproduct.errors import DataError

MAGIC, VERSION = b"MMIDIDX\0\0", 1
HEADER = struct.Struct("<9sQBQQ")
# As unsigned types of the same size: a negative id is then one beyond every vocabulary.
DTYPES = {1: "uint8", 2: "uint8", 3: "uint16", 4: "uint32", 5: "uint64", 8: "uint16"}
SIGNED = (2, 3, 4, 5)
CODES = {"uint16": 8, "uint32": 4}
"""Of our shards. Megatron has no uint32; our ids stay below 2**31, which int32 writes with the same bytes."""


class Index(NamedTuple):
    dtype: str
    sequences: int
    documents: int
    signed: bool = False
    """Whether the file has the signed type of the size of `dtype`."""

    @property
    def pointers(self) -> int:
        """Where the beginnings of sequences stand in the file."""
        return HEADER.size + 4 * self.sequences

    @property
    def document_indices(self) -> int:
        return self.pointers + 8 * self.sequences

    @property
    def size(self) -> int:
        return self.document_indices + 8 * (self.documents + 1)


def own_index(documents: int) -> Index:
    """That of a shard of ours, whose tokens may have either type."""
    return Index("", documents, documents)


def index_bytes(ends: Sequence[int], dtype: str) -> bytes:
    """The index of documents that end at `ends`, in tokens; DataError if one is longer than an int32 counts."""
    stops, itemsize = np.array(ends, dtype="<i8"), np.dtype(dtype).itemsize
    lengths = np.diff(stops, prepend=0)
    if lengths.max(initial=0) > np.iinfo(np.int32).max:
        raise DataError(f"A document has {lengths.max():,} tokens; the most is 2,147,483,647.\nCut it into several.")
    header = HEADER.pack(MAGIC, VERSION, CODES[dtype], len(ends), len(ends) + 1)
    numbers = np.arange(len(ends) + 1, dtype="<i8")
    return header + b"".join(part.tobytes() for part in (lengths.astype("<i4"), (stops - lengths) * itemsize, numbers))


def read_index(path: str, size: int, header: bytes) -> Index:
    """What the first `HEADER.size` bytes of a file of `size` bytes say; DataError if it is damaged, or holds floats."""
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{path} is not the index of a Megatron corpus: it does not begin with MMIDIDX.")
    _, version, code, sequences, entries = HEADER.unpack(header)
    if version != VERSION or code not in DTYPES:
        raise DataError(
            f"{path} has version {version} and tokens of type {code}; version 1 with types {sorted(DTYPES)} is read."
        )
    index = Index(DTYPES[code], sequences, entries - 1, code in SIGNED)
    if not sequences or not index.documents:
        raise DataError(f"{path}: the corpus holds no documents.")
    if size != index.size:
        raise DataError(
            f"{path} has {size:,} bytes; its header says {index.size:,}, for {sequences:,} sequences in "
            f"{index.documents:,} documents.\nCopy it again."
        )
    return index

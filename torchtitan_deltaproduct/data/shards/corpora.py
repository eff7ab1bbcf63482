"""Token files that others made, read where they lie: Megatron's `.bin/.idx` and the `.npy` files of OLMo.

    [model]
    hf_assets_path = "data/gpt2"              # the tokenizer that made them: they do not name it
    [data]
    paths = ["corpus/web_text_document",      # a .bin with its .idx, or a folder of such pairs
             "corpus/part-000.npy"]           # raw token ids, or what `np.save` writes; or a folder of them

    stream = open_stream("corpus/web_text_document", "data/gpt2")

Documents of a Megatron corpus begin where its index says. If none of them ends with the separator (it was made without
`--append-eod`), separators are put between them as they are read. In a `.npy` file documents begin after separators.
Such files have no checksums: a run knows them by their sizes and by some blocks of each.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from torchtitan_deltaproduct.errors import ConfigError, DataError

from ..text.tokenizer import find_eos_id, load_tokenizer, tokenizer_sha256
from .manifest import NAME, WORK, Manifest, Shard, ShardTable, read_manifest
from .megatron import HEADER, Index, read_index
from .shards import INT64, TokenStream, token_dtype
from .verified import THREADS

BLOCKS, BLOCK = 4, 1 << 14
"""Blocks of a file, and their bytes, by which a run knows it."""
LOOKED_AT = 64
"""Documents of a file whose ends are looked at, to see whether separators stand there."""

logger = logging.getLogger(__name__)


def find_files(path: str | Path) -> list[str]:
    """The token files of others that a path names, without `.bin`, or ending in `.npy`; none of a prepared folder."""
    name = os.path.abspath(path)
    if not os.path.isdir(name):
        base = name.removesuffix(".bin").removesuffix(".idx")
        if os.path.isfile(f"{base}.bin"):
            if not os.path.isfile(f"{base}.idx"):
                raise DataError(f"{base}.idx is not there beside {base}.bin.\nA Megatron corpus is the two together.")
            return [base]
        return [name] if name.endswith(".npy") and os.path.isfile(name) else []
    ours = (NAME, f"train/{NAME}", f"validation/{NAME}", WORK, f"../{WORK}")
    if any(os.path.exists(os.path.join(name, inner)) for inner in ours):
        return []
    files = sorted(map(str, Path(name).rglob("*")))
    pairs = [file[:-4] for file in files if file.endswith(".idx") and os.path.isfile(f"{file[:-4]}.bin")]
    return pairs or [file for file in files if file.endswith(".npy")]


def open_stream(path: str | Path, tokenizer_path: str = "", eos: str = "") -> TokenStream:
    """Opens a prepared folder, or token files of others.

    Args:
        path: the folder or file.
        tokenizer_path: folder with the tokenizer.json of the files of others; a prepared folder has its own.
        eos: text of the token between documents, if it is not the one that the tokenizer names.

    Raises:
        ConfigError: files of others, and no tokenizer. DataError: the data is missing, damaged or does not fit.
    """
    files = find_files(path)
    return CorpusStream(path, files, tokenizer_path, eos) if files else TokenStream(path)


def open_manifest(path: str | Path, tokenizer_path: str = "", eos: str = "") -> Manifest:
    """As `open_stream`, without a look at the shards of a prepared folder."""
    files = find_files(path)
    return read_corpus(path, tuple(files), tokenizer_path, eos).manifest if files else read_manifest(path)


class File(NamedTuple):
    """A file of tokens, as a header says and a first look shows."""

    name: str
    size: int
    """Bytes of the file of tokens."""
    dtype: str
    offset: int
    """Bytes before the first token."""
    index: Index | None
    """Of a Megatron corpus."""
    ended: int
    """Of the documents looked at, those that end with the separator."""
    looked_at: int
    fingerprint: str


class Corpus(NamedTuple):
    manifest: Manifest
    files: list[File]
    inserts: bool
    """Whether separators are put after documents as they are read."""


@lru_cache(maxsize=16)
def read_corpus(path: str | Path, names: tuple[str, ...], tokenizer_path: str, eos: str) -> Corpus:
    """What a look at each of the files of `find_files` shows: types, sizes, and whether separators are there."""
    if not tokenizer_path:
        raise ConfigError(
            f"{path} holds tokens that another program made, and does not name their tokenizer\n"
            "set model.hf_assets_path to the folder with its tokenizer.json"
        )
    vocab_size, eos_id = load_tokenizer(tokenizer_path).vocab_size, find_eos_id(tokenizer_path, eos, option="data.eos")
    with ThreadPoolExecutor(THREADS) as pool:
        files = list(pool.map(lambda name: _look(name, token_dtype(vocab_size), eos_id), names))
    first = files[0]
    for file in files:
        if file.dtype != first.dtype:
            raise DataError(
                f"{file.name} holds {file.dtype} and {first.name} {first.dtype}.\nName them as separate paths."
            )
    ended, looked_at = (sum(getattr(file, name) for file in files) for name in ("ended", "looked_at"))
    inserts = first.index is not None and not ended
    if inserts:
        logger.warning("data: the documents of %s have no separator at their ends: token %d is put there", path, eos_id)
    elif ended < looked_at:
        wrong = next(file for file in files if file.ended < file.looked_at)
        raise DataError(
            f"{looked_at - ended} of {looked_at} documents looked at in {path} do not end with the separator, token "
            f"{eos_id}, such as one of {wrong.name}.\nName the token that ends them with data.eos, or make the corpus "
            "again so that all do (Megatron: --append-eod) or none does."
        )
    rows = []
    for file in files:
        documents = file.index.documents if file.index else 0
        tokens = (file.size - file.offset) // np.dtype(file.dtype).itemsize + documents * inserts
        rows.append(Shard("", tokens, documents, 0, file.fingerprint, "0" * 64))
    manifest = Manifest(
        dtype=first.dtype, vocab_size=vocab_size, eos_id=eos_id, tokenizer_sha256=tokenizer_sha256(tokenizer_path),
        tokens=sum(row.tokens for row in rows), documents=sum(row.documents for row in rows), bytes=0,
        empty_documents=0, bad_records=0, source={"read as": "Megatron" if first.index else "npy"},
        shards=ShardTable.of(rows),
    )  # fmt: skip
    return Corpus(manifest, files, inserts)


def _look(name: str, dtype: str, eos_id: int) -> File:
    """Reads the header of a file, its last tokens or the ends of some documents, and some blocks of it."""
    try:
        if name.endswith(".npy"):
            return _look_at_npy(name, dtype, eos_id)
        with FileIO(f"{name}.idx") as index_file, FileIO(f"{name}.bin") as file:
            index_size, size = (os.fstat(each.fileno()).st_size for each in (index_file, file))
            index = read_index(f"{name}.idx", index_size, os.pread(index_file.fileno(), HEADER.size, 0))
            starts = StartsOf(index, partial(_array, index_file, INT64))
            itemsize = np.dtype(index.dtype).itemsize
            last = starts(index.documents - 1, index.documents)[0] * itemsize
            if size % itemsize or not 0 <= last < size or starts(0, 1)[0]:
                raise DataError(f"{name}.bin has {size:,} bytes, which is not what {name}.idx says.\nCopy both again.")
            looked_at = np.unique(np.linspace(0, index.documents - 1, LOOKED_AT, dtype=np.int64)).tolist()
            ends = [starts(number + 1, number + 2)[0] for number in looked_at if number + 1 < index.documents]
            ends.append(size // itemsize)
            final = [_array(file, np.dtype(index.dtype), (end - 1) * itemsize, 1)[0] for end in ends if end > 0]
            ended, prints = sum(int(token) == eos_id for token in final), [_blocks(index_file), _blocks(file)]
            return File(name, size, index.dtype, 0, index, ended, len(final), _digest(prints))
    except OSError as error:
        raise DataError(f"{error.filename or name} cannot be read: {error.strerror}.") from None


def _look_at_npy(name: str, dtype: str, eos_id: int) -> File:
    with FileIO(name) as file:
        size, offset = os.fstat(file.fileno()).st_size, 0
        if file.read(6) == b"\x93NUMPY":
            try:
                file.seek(0)
                old = np.lib.format.read_magic(file) == (1, 0)
                read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                shape, by_columns, kind = read(file)
            except ValueError as error:
                raise DataError(f"{name} is a damaged .npy file: {error}.") from None
            if kind.kind not in "iu" or kind.newbyteorder("<") != kind or (by_columns and len(shape) > 1):
                raise DataError(f"{name} holds {kind}; expected whole numbers, little endian, in the order of rows.")
            dtype, offset = f"uint{8 * kind.itemsize}", file.tell()
        tokens, rest = divmod(size - offset, np.dtype(dtype).itemsize)
        if rest or not tokens:
            raise DataError(
                f"{name} has {size:,} bytes, which is no whole number of {dtype} tokens, the type for this vocabulary."
            )
        (last,) = _array(file, np.dtype(dtype), size - np.dtype(dtype).itemsize, 1)
        return File(name, size, dtype, offset, None, int(last) == eos_id, 1, _digest([_blocks(file)]))


def _array(file: FileIO, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    return np.frombuffer(os.pread(file.fileno(), count * dtype.itemsize, int(offset)), dtype=dtype.newbyteorder("<"))


def _blocks(file: FileIO) -> bytes:
    """The size of a file and some blocks of it, the first and the last among them."""
    size = os.fstat(file.fileno()).st_size
    places = [(size - BLOCK) * number // (BLOCKS - 1) for number in range(BLOCKS)] if size > BLOCK else [0]
    return b"%d" % size + b"".join(os.pread(file.fileno(), BLOCK, place) for place in places)


def _digest(parts: list[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


class StartsOf(NamedTuple):
    """Where the documents of a Megatron file begin, which may be of several sequences each."""

    index: Index
    read: Callable[[int, int], np.ndarray]
    """(byte, count) -> [count] int64 of the index."""

    def __call__(self, first: int, last: int) -> np.ndarray:
        """Documents first .. last - 1: [last - first] int64, in tokens."""
        sequences = self.read(self.index.document_indices + 8 * first, last - first)
        low, high = sequences[0].item(), sequences[-1].item()
        if not 0 <= low <= high < self.index.sequences or (np.diff(sequences) < 0).any():
            raise DataError(f"the index of a Megatron corpus is damaged at document {first:,}: copy it again")
        pointers = self.read(self.index.pointers + 8 * low, high + 1 - low)
        return pointers[sequences - low] // np.dtype(self.index.dtype).itemsize


class CorpusStream(TokenStream):
    """The tokens of files that others made, one file after the other."""

    def __init__(self, path: str | Path, files: list[str], tokenizer_path: str, eos: str = ""):
        self.given = (path, files, tokenizer_path, eos)
        corpus = read_corpus(path, tuple(files), tokenizer_path, eos)
        self.files, self.inserts = corpus.files, corpus.inserts
        self.suffix = ".bin" if self.files[0].index else ""
        self._set(Path(path), corpus.manifest, tokenizer_path)

    def __reduce__(self) -> tuple:
        return CorpusStream, self.given

    def path(self, shard: int, suffix: str) -> Path:
        return Path(self.files[shard].name + suffix)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """As in `TokenStream`; DataError where the index begins a document and no separator stands before it."""
        before = np.empty(max(0, min(stop, self.tokens) - start), dtype=np.int64)
        self.read(start - 1, before)
        after_separators = start + np.flatnonzero(before == self.manifest.eos_id)
        if not self.files[0].index:
            return after_separators
        starts = super().document_starts(start, stop)
        if len(glued := np.setdiff1d(starts, after_separators)):
            raise DataError(
                f"{self.folder}: no separator, token {self.manifest.eos_id}, stands before the document at token "
                f"{glued[0]:,}, though other documents end with one.\nMake the corpus again with one after each "
                "(--append-eod), or set data.reset_state_at_documents = false."
            )
        return starts

    def _tokens(self, shard: int, first: int, last: int) -> np.ndarray:
        size, offset = self._dtype.itemsize, self.files[shard].offset
        if not self.inserts:
            return self._read(shard, self.suffix, self._dtype, offset + first * size, last - first)
        # The separator of a document stands before the next one begins, or at the end of the file.
        following, starts = self._search(shard, first + 1, last + 1)
        separators = starts - 1 - first
        if last == self.bounds[shard + 1] - self.bounds[shard]:
            separators = np.append(separators, last - 1 - first)
        tokens = np.full(last - first, self.manifest.eos_id, dtype=np.int64)
        real = np.ones(len(tokens), dtype=bool)
        real[separators] = False
        # One separator has been put in for each document before the one that holds token `first`.
        tokens[real] = self._read(shard, self.suffix, self._dtype, (first - following + 1) * size, real.sum().item())
        return tokens

    def _starts(self, shard: int, first: int, last: int) -> np.ndarray:
        read = partial(self._read, shard, ".idx", INT64)
        return StartsOf(self.files[shard].index, read)(first, last) + np.arange(first, last) * self.inserts

    def _open_file(self, shard: int, suffix: str) -> FileIO:
        file = FileIO(self.path(shard, suffix))
        expected = self.files[shard].index.size if suffix == ".idx" else self.files[shard].size
        if (size := os.fstat(file.fileno()).st_size) != expected:
            raise DataError(f"{self.path(shard, suffix)} has {size:,} bytes, and had {expected:,} at the start.")
        return file

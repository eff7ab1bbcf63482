"""Token files that others made, read where they lie: Megatron's `.bin/.idx` and the `.npy` files of OLMo.

    [model]
    hf_assets_path = "data/gpt2"              # the tokenizer that made them: they do not name it
    [data]
    paths = ["corpus/web_text_document",      # a .bin with its .idx, or a folder of such pairs
             "corpus/part-000.npy"]           # raw token ids, or what `np.save` writes; or a folder of them

    stream = open_stream("corpus/web_text_document", "data/gpt2")

Documents of a Megatron corpus begin where its index says. If none of them ends with the separator (it was made without
`--append-eod`), separators are put between them as they are read. In a `.npy` file documents begin after separators,
and its end ends the last one: a separator is put there as it is read, if none stands there.
Such files have no checksums: a run knows them by their sizes and by some blocks of each. Whether the vocabulary has
their ids is looked at in these blocks when they are opened, in all that is read as it is read, and in every token by
`data.show CORPUS --verify`.
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
from .manifest import NAME, WORK, Manifest, Shard, read_manifest
from .megatron import HEADER, Index, read_index
from .shards import INT64, TokenStream, beyond_vocabulary, token_dtype
from .verified import THREADS

BLOCKS, BLOCK = 4, 1 << 14
"""Blocks of a file, and their bytes, by which a run knows it."""
LOOKED_AT = 64
"""Documents of a file whose ends are looked at, to see whether separators stand there."""

NO_TOKENIZER = (
    "{} holds tokens that another program made, and does not name their tokenizer\n"
    "set {} to the folder with its tokenizer.json"
)

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

    These need the folder of their tokenizer.json; and the text of the token between documents, if it is not the one
    that the tokenizer names.

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
    """What a look at a file of tokens shows."""

    name: str
    size: int
    """Bytes of the file of tokens."""
    dtype: str
    """As which tokens are read: unsigned, see `megatron.DTYPES`."""
    signed: bool
    """Whether the file has the signed type of that size."""
    offset: int
    """Bytes before the first token."""
    index: Index | None
    """Of a Megatron corpus."""
    ended: list[bool]
    """Of the documents looked at, whether the separator ends them."""
    fingerprint: str

    def as_written(self, token: np.integer) -> int:
        """A token as it was read, as the number that stands in the file."""
        as_read = token.astype(self.dtype)
        return int(as_read.view(f"<i{as_read.itemsize}") if self.signed else as_read)

    def starts(self, read: Callable[[int, int], np.ndarray], first: int, last: int) -> np.ndarray:
        """Where the documents first .. last - 1 of a Megatron file begin, in tokens: [last - first] int64.

        `read(byte, count)` gives int64 of the index. A document may be of several sequences.
        """
        sequences = read(self.index.document_indices + 8 * first, last - first)
        low, high = sequences[0].item(), sequences[-1].item()
        if not 0 <= low <= high < self.index.sequences or (np.diff(sequences) < 0).any():
            raise DataError(f"{self.name}.idx is damaged at document {first:,}: copy it again")
        pointers = read(self.index.pointers + 8 * low, high + 1 - low)
        return pointers[sequences - low] // np.dtype(self.dtype).itemsize


class Corpus(NamedTuple):
    manifest: Manifest
    files: list[File]
    inserts: list[int]
    """Separators put into each file as it is read: none, or one after each document, or at the end of a `.npy`."""


@lru_cache(maxsize=16)
def read_corpus(path: str | Path, names: tuple[str, ...], tokenizer_path: str, eos: str) -> Corpus:
    """What a look at each of the files of `find_files` shows: types, sizes, and whether separators are there."""
    if not tokenizer_path:
        raise ConfigError(NO_TOKENIZER.format(path, "model.hf_assets_path"))
    vocab_size, eos_id = load_tokenizer(tokenizer_path).vocab_size, find_eos_id(tokenizer_path, eos, option="data.eos")
    with ThreadPoolExecutor(THREADS) as pool:
        files = list(pool.map(lambda name: _look(name, vocab_size, eos_id), names))
    first = files[0]
    if other := next((file for file in files if file.dtype != first.dtype), None):
        raise DataError(
            f"{other.name} holds {other.dtype} and {first.name} {first.dtype}.\nName them as separate paths."
        )
    documents = [file.index.documents if file.index else 0 for file in files]
    ended = [end for file in files for end in file.ended]
    inserts = [0] * len(files)
    if not first.index:
        inserts = [int(not end) for end in ended]
        if any(inserts):
            logger.warning(
                "data: %d of %d files of %s do not end with the separator, token %d: it is put there, so that their "
                "last documents end with them", sum(inserts), len(files), path, eos_id,
            )  # fmt: skip
    elif not any(ended):
        inserts = documents
        logger.warning("data: the documents of %s have no separator at their ends: token %d is put there", path, eos_id)
    elif not all(ended):
        wrong = next(file.name for file in files if not all(file.ended))
        raise DataError(
            f"{ended.count(False)} of {len(ended)} documents looked at in {path} do not end with the separator, token "
            f"{eos_id}, such as one of {wrong}.\nName the token that ends them with data.eos, or make the corpus "
            "again so that all do (Megatron: --append-eod) or none does."
        )
    itemsize = np.dtype(first.dtype).itemsize
    tokens = [(file.size - file.offset) // itemsize + n for file, n in zip(files, inserts, strict=True)]
    prints = [file.fingerprint for file in files]
    manifest = Manifest(
        dtype=first.dtype, vocab_size=vocab_size, eos_id=eos_id, tokenizer_sha256=tokenizer_sha256(tokenizer_path),
        tokens=sum(tokens), documents=sum(documents), bytes=0, empty_documents=0, bad_records=0,
        source={"read as": "Megatron" if first.index else "npy"},
        shards=[Shard("", n, d, 0, digest, "0" * 64) for n, d, digest in zip(tokens, documents, prints, strict=True)],
    )  # fmt: skip
    return Corpus(manifest, files, inserts)


def _look(name: str, vocab_size: int, eos_id: int) -> File:
    """Reads the header of a file, the ends of some documents or the last token, and some blocks of it."""
    try:
        if name.endswith(".npy"):
            with FileIO(name) as file:
                seen = _look_at_npy(name, file, token_dtype(vocab_size), eos_id)
                _check_some(seen, name, file, vocab_size)
                return seen
        with FileIO(f"{name}.idx") as index_file, FileIO(f"{name}.bin") as file:
            seen = _look_at_megatron(name, index_file, file, eos_id)
            _check_some(seen, f"{name}.bin", file, vocab_size)
            return seen
    except OSError as error:
        raise DataError(f"{error.filename or name} cannot be read: {error.strerror}.") from None


def _look_at_megatron(name: str, index_file: FileIO, file: FileIO, eos_id: int) -> File:
    size, header = _size(file), os.pread(index_file.fileno(), HEADER.size, 0)
    index = read_index(f"{name}.idx", _size(index_file), header)
    seen = File(name, size, index.dtype, index.signed, 0, index, [], _fingerprint(index_file, file))
    dtype, starts = np.dtype(index.dtype), partial(seen.starts, partial(_array, index_file, INT64))
    last = starts(index.documents - 1, index.documents)[0] * dtype.itemsize
    if size % dtype.itemsize or not 0 <= last < size or starts(0, 1)[0]:
        raise DataError(f"{name}.bin has {size:,} bytes, which is not what {name}.idx says.\nCopy both again.")
    some = np.unique(np.linspace(1, index.documents, LOOKED_AT, dtype=np.int64)).tolist()
    ends = [starts(n, n + 1)[0] if n < index.documents else size // dtype.itemsize for n in some]
    tokens = [_array(file, dtype, (end - 1) * dtype.itemsize, 1)[0] for end in ends if end]
    return seen._replace(ended=[int(token) == eos_id for token in tokens])


def _look_at_npy(name: str, file: FileIO, dtype: str, eos_id: int) -> File:
    size, signed, offset = _size(file), False, 0
    if file.read(6) == b"\x93NUMPY":
        try:
            saved = np.load(name, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise DataError(f"{name} is a damaged .npy file: {error}.") from None
        if saved.dtype.kind not in "iu" or not saved.dtype.isnative or not saved.flags.c_contiguous:
            raise DataError(f"{name} holds {saved.dtype}; expected whole numbers, little endian, in the order of rows.")
        if saved.ndim != 1:
            raise DataError(
                f"{name} holds an array of shape {list(saved.shape)}; expected token ids in one dimension, [n].\n"
                "Save it again as such: np.save(file, array.reshape(-1))"
            )
        dtype, signed, offset = f"uint{8 * saved.itemsize}", saved.dtype.kind == "i", saved.offset
    itemsize = np.dtype(dtype).itemsize
    if size == offset or (size - offset) % itemsize:
        raise DataError(
            f"{name} has {size:,} bytes, which is no whole number of {dtype} tokens, the type for this vocabulary."
        )
    last = _array(file, np.dtype(dtype), size - itemsize, 1)[0]
    return File(name, size, dtype, signed, offset, None, [int(last) == eos_id], _fingerprint(file))


def _check_some(seen: File, path: str, file: FileIO, vocab_size: int) -> None:
    """Raises DataError if an id in some blocks of a file, about those of `_fingerprint`, is not in the vocabulary."""
    dtype = np.dtype(seen.dtype)
    tokens = (seen.size - seen.offset) // dtype.itemsize
    count = min(tokens, BLOCK // dtype.itemsize)
    for number in range(BLOCKS):
        first = (tokens - count) * number // (BLOCKS - 1)
        block = _array(file, dtype, seen.offset + first * dtype.itemsize, count)
        if (highest := block.max()) >= vocab_size:
            raise beyond_vocabulary(path, seen.as_written(highest), first + int(block.argmax()), vocab_size)


def _array(file: FileIO, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    return np.frombuffer(os.pread(file.fileno(), count * dtype.itemsize, int(offset)), dtype=dtype.newbyteorder("<"))


def _size(file: FileIO) -> int:
    return os.fstat(file.fileno()).st_size


def _fingerprint(*files: FileIO) -> str:
    """Checksum of the sizes of files and of some blocks of each, the first and the last among them."""
    digest = hashlib.sha256()
    for file in files:
        size = _size(file)
        digest.update(b"%d" % size)
        for number in range(BLOCKS):
            digest.update(os.pread(file.fileno(), BLOCK, max(0, size - BLOCK) * number // (BLOCKS - 1)))
    return digest.hexdigest()


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
        if not self.inserts[shard]:
            return self._read(shard, self.suffix, self._dtype, offset + first * size, last - first)
        # The separator of a document stands before the next one begins, or at the end of the file.
        only = 1, np.empty(0, dtype=np.int64)
        following, starts = self._search(shard, first + 1, last + 1) if self.files[shard].index else only
        separators = starts - 1 - first
        if last == self.bounds[shard + 1] - self.bounds[shard]:
            separators = np.append(separators, last - 1 - first)
        # Unsigned, as what is read, and large enough for the separator.
        tokens = np.full(last - first, self.manifest.eos_id, dtype=np.promote_types(self._dtype, np.uint32))
        real = np.ones(len(tokens), dtype=bool)
        real[separators] = False
        # One separator has been put in for each document before the one that holds token `first`.
        begin = offset + (first - following + 1) * size
        tokens[real] = self._read(shard, self.suffix, self._dtype, begin, real.sum().item())
        return tokens

    def _in_file(self, shard: int, token: np.integer, place: int) -> tuple[int, int]:
        if self.files[shard].index and self.inserts[shard]:
            # One separator has been put in for each document before its own.
            place -= self._search(shard, place + 1, place + 2)[0] - 1
        return self.files[shard].as_written(token), place

    def _starts(self, shard: int, first: int, last: int) -> np.ndarray:
        starts = self.files[shard].starts(partial(self._read, shard, ".idx", INT64), first, last)
        return starts + np.arange(first, last) * bool(self.inserts[shard])

    def _open_file(self, shard: int, suffix: str) -> FileIO:
        file = FileIO(self.path(shard, suffix))
        expected = self.files[shard].index.size if suffix == ".idx" else self.files[shard].size
        if (size := _size(file)) != expected:
            raise DataError(f"{self.path(shard, suffix)} has {size:,} bytes, and had {expected:,} at the start.")
        return file

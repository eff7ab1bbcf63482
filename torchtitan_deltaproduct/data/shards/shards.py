"""Token shards on disk: written by `prepare`, read at any position.

A shard is `<name>.bin`, token ids in the smallest integer type, and `<name>.idx`, where documents begin (`megatron`).
A folder of shards is one stream of tokens, and before its first token stands one more separator, at position -1, so
that every token has a predecessor.

    stream = TokenStream("data/code/train")
    stream.read(-1, np.empty(2049, np.int64))         # the separator and the first 2,048 tokens
"""

import hashlib
import os
import resource
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

import numpy as np

from torchtitan_deltaproduct.errors import ConfigError, DataError

from .manifest import Manifest, Shard, read_manifest
from .megatron import index_bytes, own_index
from .verified import Verified, check_size, file_size

MOST_DESCRIPTORS = 1 << 14
INDEX_BLOCK = 512
"""Entries of an .idx read at a time."""
INT64 = np.dtype("<i8")


def token_dtype(vocab_size: int) -> str:
    """The smallest integer type for ids below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class ShardWriter:
    """Writes one shard of tokens of type `dtype`: `name` in a prepared folder, such as `shards/00003`.

    The files get their names in `close`; before that they are `<name>.bin.tmp<pid>`.
    """

    def __init__(self, folder: Path, name: str, dtype: str):
        self.name, self.path = name, Path(folder, name)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.tokens, self.text_bytes, self.ends = 0, 0, []
        self.digest = hashlib.sha256()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self._temporary(".bin"), "wb")  # noqa: SIM115 (closed in close or abandon)

    def add(self, ids: Sequence[int], text_bytes: int) -> None:
        """Appends one document: its token ids, separator included, and the UTF-8 bytes of its text."""
        raw = np.array(ids, dtype=self.dtype).tobytes()
        self.file.write(raw)
        self.digest.update(raw)
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        self.ends.append(self.tokens)

    def close(self) -> Shard | None:
        """Finishes the files and describes them; a shard without documents leaves no file and gives None."""
        if not self.ends:
            self.abandon()
            return None
        index = index_bytes(self.ends, self.dtype.name)
        Path(self._temporary(".idx")).write_bytes(index)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        for suffix in (".bin", ".idx"):
            os.replace(self._temporary(suffix), f"{self.path}{suffix}")
        digests = self.digest.hexdigest(), hashlib.sha256(index).hexdigest()
        return Shard(self.name, self.tokens, len(self.ends), self.text_bytes, *digests)

    def abandon(self) -> None:
        self.file.close()
        for suffix in (".bin", ".idx"):
            Path(self._temporary(suffix)).unlink(missing_ok=True)

    def _temporary(self, suffix: str) -> str:
        return f"{self.path}{suffix}.tmp{os.getpid()}"


class TokenStream:
    """The tokens of a prepared folder as one sequence, read by position.

    Opening it reads the manifest and looks at the folder of the shards; each shard is looked at when it is opened, and
    compared with its checksum if it is not known to be what `prepare` wrote (`verified`). Cheap to pickle: workers open
    their own files. Positions run from -1, the leading separator, to `tokens`.
    """

    suffix = ".bin"
    """Of the files of tokens."""
    _open = weakref.WeakSet()
    """The streams of this process, which share the descriptors it may have."""

    def __init__(self, folder: str | Path):
        self._set(Path(folder), read_manifest(folder), str(Path(folder, "tokenizer")))
        self.verified = Verified(self.folder, self.manifest)
        self.verified.start()

    def _set(self, folder: Path, manifest: Manifest, tokenizer_path: str) -> None:
        self.folder, self.manifest, self.tokenizer_path = folder, manifest, tokenizer_path
        self.tokens = manifest.tokens
        rows = manifest.shards.rows
        self._documents = rows["documents"]
        # Stream position of the first token of each shard, and the end of the last.
        self.bounds = np.concatenate([[0], np.cumsum(rows["tokens"])])
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._files: OrderedDict[tuple[int, str], FileIO] = OrderedDict()
        self._open.add(self)

    def __reduce__(self) -> tuple:
        return TokenStream, (self.folder,)

    def path(self, shard: int, suffix: str) -> Path:
        return self.folder / (self.manifest.shards[shard].name + suffix)

    def read(self, start: int, out: np.ndarray) -> int:
        """Copies tokens `start`, `start + 1`, ... into `out: [n] int64`; returns how many there were.

        Raises:
            DataError: there is an id outside of the vocabulary among them, or a file is not what the manifest says.
        """
        filled = 0
        if start == -1 and len(out):
            out[0] = self.manifest.eos_id
            filled = 1
        stop = min(start + len(out), self.tokens)
        for shard, first, last in self._spans(start + filled, stop):
            piece = self._tokens(shard, first, last)
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            if (highest := piece.max()) >= self.manifest.vocab_size:
                token, place = self._in_file(shard, highest, first + int(piece.argmax()))
                raise beyond_vocabulary(self.path(shard, self.suffix), token, place, self.manifest.vocab_size)
        return filled

    def close(self) -> None:
        """Closes the files; reading opens them again."""
        self._files.clear()

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Stream positions in [start, stop) where a document begins: [d] int64."""
        spans = self._spans(start, min(stop, self.tokens))
        starts = [self._search(shard, first, last)[1] + self.bounds[shard] for shard, first, last in spans]
        return np.concatenate(starts) if starts else np.empty(0, dtype=np.int64)

    def document(self, number: int) -> np.ndarray:
        """Tokens of a document, counted from 0 over all shards, its separator included: [n] int64."""
        if not 0 <= number < self.manifest.documents:
            raise ConfigError(f"--document is {number}: {self.folder} has documents 0 to {self.manifest.documents - 1}")
        before = np.concatenate([[0], np.cumsum(self._documents)])
        shard = int(before.searchsorted(number, side="right")) - 1
        inside, base = number - int(before[shard]), self.bounds[shard]
        last = min(inside + 2, self._documents[shard].item())
        start, stop = [*(base + self._starts(shard, inside, last)).tolist(), self.bounds[shard + 1].item()][:2]
        tokens = np.empty(stop - start, dtype=np.int64)
        self.read(start, tokens)
        return tokens

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The pieces (shard, first, last) that make up [start, stop)."""
        shard = int(self.bounds.searchsorted(start, side="right")) - 1
        while start < stop:
            base, end = self.bounds[shard].item(), self.bounds[shard + 1].item()
            yield shard, start - base, min(stop, end) - base
            start, shard = end, shard + 1

    def _search(self, shard: int, first: int, last: int) -> tuple[int, np.ndarray]:
        """The documents of a shard that begin in [first, last): the number of the first, their positions [d] int64.

        The first is between the entries `low` and `high` of the index. In turns it is looked for where it would be if
        all documents were equally long, which is nearly right as a rule, and in the middle, which is never slow.
        """
        entries, tokens = self._documents[shard].item(), self.bounds[shard + 1].item() - self.bounds[shard].item()
        low, high, before, after, halve = 0, entries, 0, tokens, False
        while high - low > INDEX_BLOCK:
            share = 0.5 if halve else (first - before) / (after - before)
            place = low + int(share * (high - low - INDEX_BLOCK))
            block = self._starts(shard, place, place + INDEX_BLOCK)
            if block[-1] < first:
                low, before = place + INDEX_BLOCK, block[-1].item()
            elif block[0] >= first:
                high, after = place + 1, block[0].item()
            else:
                break
            halve = not halve
        else:
            place, block = low, self._starts(shard, low, high)
        blocks, end = [block], place + len(block)
        while block[-1] < last and end < entries:
            stop = min(end + max(INDEX_BLOCK, 2 * len(block)), entries)
            block = self._starts(shard, end, stop)
            blocks.append(block)
            end = stop
        starts = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        a, b = starts.searchsorted(first), starts.searchsorted(last)
        return place + int(a), starts[a:b]

    def _tokens(self, shard: int, first: int, last: int) -> np.ndarray:
        return self._read(shard, self.suffix, self._dtype, first * self._dtype.itemsize, last - first)

    def _in_file(self, shard: int, token: np.integer, place: int) -> tuple[int, int]:
        """A token of `_tokens`, at a place of the shard, as the number that stands in the file, and where."""
        return int(token), place

    def _starts(self, shard: int, first: int, last: int) -> np.ndarray:
        """Where the documents first .. last - 1 of a shard begin: [last - first] int64, not none."""
        if self.manifest.version > 2:
            offset = own_index(self._documents[shard].item()).pointers + 8 * first
            return self._read(shard, ".idx", INT64, offset, last - first) // self._dtype.itemsize
        # The file holds where they end.
        ends = self._read(shard, ".idx", INT64, 8 * max(0, first - 1), last - max(1, first))
        return ends if first else np.concatenate([[0], ends])

    def _read(self, shard: int, suffix: str, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        """Entries of a file of a shard, from a byte on."""
        entries, file = np.empty(count, dtype=dtype), self._file(shard, suffix)
        done = os.preadv(file.fileno(), [entries], offset)
        while done < entries.nbytes:
            read = os.preadv(file.fileno(), [entries.view(np.uint8)[done:]], offset + done)
            if not read:
                raise DataError(f"{self.path(shard, suffix)} was cut short while it was read.\nCopy it again.")
            done += read
        return entries

    def _file(self, shard: int, suffix: str) -> FileIO:
        """An open file of a shard; of many, those used last stay open."""
        key = (shard, suffix)
        if key in self._files:
            self._files.move_to_end(key)
            return self._files[key]
        self._files[key] = self._open_file(shard, suffix)
        while len(self._files) > max(2, most_descriptors() // len(self._open)):
            self._files.popitem(last=False)
        return self._files[key]

    def _open_file(self, shard: int, suffix: str) -> FileIO:
        path = self.path(shard, suffix)
        try:
            file = FileIO(path)
        except FileNotFoundError:
            check_size(path, None, file_size(self.manifest, shard, suffix))
        self.verified.check(shard, suffix, file)
        return file


def beyond_vocabulary(path: str | Path, token: int, place: int, vocab_size: int) -> DataError:
    """What to say of an id in a file of tokens that the tokenizer does not have; places are counted from 0."""
    return DataError(
        f"{path} holds token {token:,} at place {place:,}; the vocabulary ends at {vocab_size - 1:,}\n"
        "it was not made with this tokenizer: prepare the data again, or name the right one with model.hf_assets_path"
    )


def most_descriptors() -> int:
    """Files that all streams of this process may keep open: half of what it may have."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_DESCRIPTORS if limit == resource.RLIM_INFINITY else min(limit // 2, MOST_DESCRIPTORS)

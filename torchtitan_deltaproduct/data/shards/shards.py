"""Token shards on disk: written by `prepare`, read at any position.

A shard is `<name>.bin`, token ids in the smallest integer type, and `<name>.idx`, int64, for each document
the position after its separator. A folder of shards is one stream of tokens, and before its first token
stands one more separator, at position -1, so that every token has a predecessor.

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

from torchtitan_deltaproduct.errors import DataError

from .manifest import Manifest, Shard, read_manifest
from .verified import Verified, check_size, file_size

MOST_DESCRIPTORS = 1 << 14
INDEX_BLOCK = 512
"""Entries of an .idx read at a time."""


def token_dtype(vocab_size: int) -> str:
    """The smallest integer type for ids below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class ShardWriter:
    """Writes one shard. The files get their names in `close`; before that they are `<name>.bin.tmp<pid>`.

    Args:
        folder: the prepared folder.
        name: of the shard inside it, such as `shards/00003`.
        dtype: `uint16` or `uint32`.
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
        index = np.array(self.ends, dtype="<i8").tobytes()
        Path(self._temporary(".idx")).write_bytes(index)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        for suffix in (".bin", ".idx"):
            os.replace(self._temporary(suffix), f"{self.path}{suffix}")
        return Shard(
            self.name,
            self.tokens,
            len(self.ends),
            self.text_bytes,
            self.digest.hexdigest(),
            hashlib.sha256(index).hexdigest(),
        )

    def abandon(self) -> None:
        """Removes what was written."""
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

    _open = weakref.WeakSet()
    """The streams of this process, which share the descriptors it may have."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(folder)
        self.verified = Verified(self.folder, self.manifest)
        self.verified.start()
        self.tokens = self.manifest.tokens
        rows = self.manifest.shards.rows
        self._documents = rows["documents"]
        # Stream position of the first token of each shard, and the end of the last.
        self.bounds = np.concatenate([[0], np.cumsum(rows["tokens"])])
        self._types = {".bin": np.dtype(self.manifest.dtype).newbyteorder("<"), ".idx": np.dtype("<i8")}
        self._files: OrderedDict[tuple[int, str], FileIO] = OrderedDict()
        self._open.add(self)

    def __reduce__(self) -> tuple:
        return TokenStream, (self.folder,)

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
            piece = self._read(shard, ".bin", first, last)
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            if piece.max() >= self.manifest.vocab_size:
                raise DataError(
                    f"{self.verified.path(shard, '.bin')} holds token {piece.max():,}; the vocabulary ends at "
                    f"{self.manifest.vocab_size - 1:,}\nit was not made with this tokenizer: prepare the data again"
                )
        return filled

    def close(self) -> None:
        """Closes the files; reading opens them again."""
        self._files.clear()

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Stream positions in [start, stop) where a document begins: [d] int64."""
        starts = [np.empty(0, dtype=np.int64)]
        for shard, first, last in self._spans(start, min(stop, self.tokens)):
            # Documents begin at 0 and at every end but the last, which is the next shard's beginning.
            if first == 0:
                starts.append(self.bounds[shard : shard + 1])
            starts.append(self._ends(shard, first, last) + self.bounds[shard])
        return np.concatenate(starts)

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The pieces (shard, first, last) that make up [start, stop)."""
        shard = int(self.bounds.searchsorted(start, side="right")) - 1
        while start < stop:
            base, end = self.bounds[shard].item(), self.bounds[shard + 1].item()
            yield shard, start - base, min(stop, end) - base
            start, shard = end, shard + 1

    def _ends(self, shard: int, first: int, last: int) -> np.ndarray:
        """The positions after a document, in a shard, that are in [first, last): [d] int64, by search in the .idx.

        The first of them is between the entries `low` and `high`. In turns it is looked for where it would be if all
        documents were equally long, which is nearly right as a rule, and in the middle, which is never slow.
        """
        entries, tokens = self._documents[shard].item(), self.bounds[shard + 1].item() - self.bounds[shard].item()
        low, high, before, after, halve = 0, entries, 0, tokens, False
        while high - low > INDEX_BLOCK:
            share = 0.5 if halve else (first - before) / (after - before)
            place = low + int(share * (high - low - INDEX_BLOCK))
            block = self._read(shard, ".idx", place, place + INDEX_BLOCK)
            if block[-1] < first:
                low, before = place + INDEX_BLOCK, block[-1].item()
            elif block[0] >= first:
                high, after = place + 1, block[0].item()
            else:
                break
            halve = not halve
        else:
            place, block = low, self._read(shard, ".idx", low, high)
        blocks = [block]
        while block[-1] < last and place + len(block) < entries:
            place, size = place + len(block), max(INDEX_BLOCK, 2 * len(block))
            block = self._read(shard, ".idx", place, min(place + size, entries))
            blocks.append(block)
        ends = block if len(blocks) == 1 else np.concatenate(blocks)
        return ends[ends.searchsorted(first) : ends.searchsorted(last)]

    def _read(self, shard: int, suffix: str, first: int, last: int) -> np.ndarray:
        """Entries [first, last) of a file of a shard."""
        entries = np.empty(last - first, dtype=self._types[suffix])
        file, offset = self._file(shard, suffix), first * entries.itemsize
        done = os.preadv(file.fileno(), [entries], offset)
        while done < entries.nbytes:
            count = os.preadv(file.fileno(), [entries.view(np.uint8)[done:]], offset + done)
            if not count:
                raise DataError(f"{self.verified.path(shard, suffix)} was cut short while it was read.\nCopy it again.")
            done += count
        return entries

    def _file(self, shard: int, suffix: str) -> FileIO:
        """An open file of a shard; of many, those used last stay open."""
        key = (shard, suffix)
        if key in self._files:
            self._files.move_to_end(key)
            return self._files[key]
        path = self.verified.path(shard, suffix)
        try:
            file = FileIO(path)
        except FileNotFoundError:
            check_size(path, None, file_size(self.manifest, shard, suffix))
        self.verified.check(shard, suffix, file)
        self._files[key] = file
        while len(self._files) > max(2, most_descriptors() // len(self._open)):
            self._files.popitem(last=False)
        return file


def most_descriptors() -> int:
    """Files that all streams of this process may keep open: half of what it may have."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_DESCRIPTORS if limit == resource.RLIM_INFINITY else min(limit // 2, MOST_DESCRIPTORS)

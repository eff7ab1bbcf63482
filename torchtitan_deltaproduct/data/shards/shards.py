"""Token shards on disk: written by `prepare`, read by memory map.

A shard is `<name>.bin`, token ids in the smallest integer type, and `<name>.idx`, int64, for each document
the position after its separator. A folder of shards is one stream of tokens, and before its first token
stands one more separator, at position -1, so that every token has a predecessor.

    stream = TokenStream("data/code/train")
    stream.read(-1, np.empty(2049, np.int64))         # the separator and the first 2,048 tokens
"""

import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path

import numpy as np

from torchtitan_deltaproduct.errors import DataError

from .manifest import Manifest, Shard, read_manifest
from .verified import check_shards

# Every map holds a file descriptor; the usual limit of a process is 1,024.
MAX_OPEN_MAPS = 256


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

    def add(self, ids: list[int], text_bytes: int) -> None:
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

    Opening it compares the files with their checksums once (`verified`). Cheap to pickle: workers open their own maps.
    Positions run from -1, the leading separator, to `tokens`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(folder)
        check_shards(self.folder, self.manifest)
        self.tokens = self.manifest.tokens
        # Stream position of the first token of each shard, and the end of the last.
        self.bounds = [0, *accumulate(shard.tokens for shard in self.manifest.shards)]
        self._maps: OrderedDict[tuple[int, str], np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": OrderedDict()}

    def read(self, start: int, out: np.ndarray) -> int:
        """Copies tokens `start`, `start + 1`, ... into `out: [n] int64`; returns how many there were.

        Raises:
            DataError: there is an id outside of the vocabulary among them.
        """
        filled = 0
        if start == -1 and len(out):
            out[0] = self.manifest.eos_id
            filled = 1
        stop = min(start + len(out), self.tokens)
        for shard, first, last in self._spans(start + filled, stop):
            piece = self._map(shard, ".bin")[first:last]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            if piece.max() >= self.manifest.vocab_size:
                raise DataError(
                    f"{self.path(shard, '.bin')} holds token {piece.max():,}; the vocabulary ends at "
                    f"{self.manifest.vocab_size - 1:,}\nit was not made with this tokenizer: prepare the data again"
                )
        return filled

    def close(self) -> None:
        """Closes the maps, whose pages count as memory of the process; reading opens them again."""
        self._maps.clear()

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Stream positions in [start, stop) where a document begins: [d] int64."""
        found = []
        for shard, first, last in self._spans(start, min(stop, self.tokens)):
            ends = self._map(shard, ".idx")
            # Begins: 0 and every end but the last; an end equal to the shard's length begins nothing here.
            inside = ends[np.searchsorted(ends, first) : np.searchsorted(ends, last)]
            base = self.bounds[shard]
            if first == 0:
                found.append(np.array([base]))
            found.append(inside + base)
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _spans(self, start: int, stop: int):
        """The pieces (shard, first, last) that make up [start, stop)."""
        shard = bisect_right(self.bounds, start) - 1
        while start < stop:
            base, end = self.bounds[shard], self.bounds[shard + 1]
            yield shard, start - base, min(stop, end) - base
            start, shard = end, shard + 1

    def path(self, shard: int, suffix: str) -> Path:
        """The file of a shard, `.bin` or `.idx`."""
        return self.folder / (self.manifest.shards[shard].name + suffix)

    def _map(self, shard: int, suffix: str) -> np.ndarray:
        key = (shard, suffix)
        if key in self._maps:
            self._maps.move_to_end(key)
            return self._maps[key]
        dtype = np.dtype("i8" if suffix == ".idx" else self.manifest.dtype).newbyteorder("<")
        self._maps[key] = np.memmap(self.path(shard, suffix), dtype=dtype, mode="r").view(np.ndarray)
        if len(self._maps) > MAX_OPEN_MAPS:
            self._maps.popitem(last=False)
        return self._maps[key]

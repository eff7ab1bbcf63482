"""Are the shards of a prepared folder still what `prepare` wrote? No token is read from a file that may not be.

    verified = Verified(Path("data/code/train"), manifest)
    verified.start(); verified.check(shard, ".bin", file)      # DataError names the files that differ

A size proves little: a restored, half-copied or foreign file of the same size holds other tokens. Checksums are
compared once; `.verified-*.npy` in the folder (or, where that cannot be written, in the user's cache) then knows each
file by its size, time and inode, and each folder of shards by its time and inode. A start looks at those folders
alone: a copy, or one with a file added, removed or replaced, is gone through, by one process while the others wait. A
file that was written to in place is noticed when it is opened, and compared then.
"""

import fcntl
import hashlib
import io
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import numpy as np

from torchtitan_deltaproduct.devices import cores
from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.files import read_bytes, write_atomically

from .manifest import Manifest
from .megatron import own_index

NOTE = ".verified-{}.npy"
"""Of the first digits of `content_sha256`: [folders + 2 * shards, 3] int64, see `state`; `.bin` and `.idx` in turns."""
SUFFIXES = (".bin", ".idx")
THREADS = 8
LOGGED_FROM = 1 << 30
"""Bytes from which on the log says what takes time."""

logger = logging.getLogger(__name__)


class Verified:
    """What is known of the files of a prepared folder. DataError names those that are not what the manifest says."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self.note = self._read_note()

    def start(self) -> None:
        """Looks at the folders of the shards; if one changed, or none was looked at, compares what is not known."""
        if self._same_folders():
            return
        with alone(self.folder):
            self.note = self._read_note()
            if not self._same_folders():
                self._note_files(compare)

    def trust(self) -> None:
        """Notes the files as they are now, for who has just written them and knows their checksums."""
        self._note_files(lambda *_: None)

    def check(self, shard: int, suffix: str, file: FileIO) -> None:
        """Compares an open file with its checksum, unless that was done since it last changed."""
        row, status = len(self.manifest.shards.folders) + 2 * shard + SUFFIXES.index(suffix), os.fstat(file.fileno())
        if self.note[row].tolist() == state(status):
            return
        path = self.folder / (self.manifest.shards[shard].name + suffix)
        check_size(path, status.st_size, file_size(self.manifest, shard, suffix))
        with alone(self.folder):
            self.note = self._read_note()
            if self.note[row].tolist() != state(status):
                compare(self.folder, self.manifest, [(shard, suffix)])
                self.note[row] = state(status)
                self._write_note()

    def _folder_states(self) -> list[list[int]]:
        folders = [self.folder / name for name in self.manifest.shards.folders]
        # The size of a folder is the file system's affair.
        return [[0, *state(path.stat())[1:]] if path.is_dir() else [0, 0, 0] for path in folders]

    def _same_folders(self) -> bool:
        return self.note[: len(self.manifest.shards.folders)].tolist() == self._folder_states()

    def _note_files(self, comparison: Callable[[Path, Manifest, list[tuple[int, str]]], None]) -> None:
        # Before the files: what changes in between is seen by the next start.
        folders, states = self._folder_states(), file_states(self.folder, self.manifest)
        changed = np.flatnonzero((self.note[len(folders) :] != states).any(axis=1)).tolist()
        comparison(self.folder, self.manifest, [(row // 2, SUFFIXES[row % 2]) for row in changed])
        self.note = np.concatenate([np.array(folders, dtype=np.int64), states])
        self._write_note()

    def _note_path(self) -> Path:
        name = NOTE.format(self.manifest.content_sha256[:16])
        if os.access(self.folder, os.W_OK):
            return self.folder / name
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        key = hashlib.sha256(os.fsencode(os.path.realpath(self.folder))).hexdigest()[:16]
        return Path(cache, "torchtitan_deltaproduct", f"{key}{name}")

    def _read_note(self) -> np.ndarray:
        shape = (len(self.manifest.shards.folders) + 2 * len(self.manifest.shards), 3)
        try:
            note = np.load(io.BytesIO(read_bytes(self._note_path())))
        except Exception:  # of a damaged file it raises nearly anything
            note = None
        fits = note is not None and note.shape == shape and note.dtype == np.int64
        return note if fits else np.full(shape, -1, dtype=np.int64)

    def _write_note(self) -> None:
        content, path = io.BytesIO(), self._note_path()
        np.save(content, self.note)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content.getvalue())
        except OSError as error:
            logger.warning("%s: that its files were compared cannot be noted (%s): each start does it again",
                           self.folder, error)  # fmt: skip


def compare(folder: Path, manifest: Manifest, files: list[tuple[int, str]]) -> None:
    """Compares files, by shard and suffix, with their checksums; DataError names those that differ."""
    shards = manifest.shards
    paths = [folder / (shards[shard].name + suffix) for shard, suffix in files]
    if (size := sum(file_size(manifest, *file) for file in files)) >= LOGGED_FROM:
        logger.info("%s: comparing %.1f GB with their checksums, once", folder, size / 1e9)
    with ThreadPoolExecutor(min(THREADS, cores())) as pool:
        digests = list(pool.map(file_sha256, paths))
    expected = [getattr(shards[shard], f"{suffix[1:]}_sha256") for shard, suffix in files]
    wrong = [str(path) for path, *pair in zip(paths, digests, expected, strict=True) if pair[0] != pair[1]]
    if wrong:
        raise DataError(
            f"{len(wrong)} of {2 * len(shards)} files differ from their checksums: {', '.join(wrong[:3])}\n"
            "Copy them again, or make the folder again with prepare --overwrite."
        )


def file_states(folder: Path, manifest: Manifest) -> np.ndarray:
    """Looks at every file: [2 * shards, 3] int64, see `state`; DataError if one has not the size it must have."""
    states = []
    for number, shard in enumerate(manifest.shards):
        for suffix in SUFFIXES:
            path = os.path.join(folder, shard.name + suffix)
            try:
                status = os.stat(path)
            except OSError:
                status = None
            check_size(path, status and status.st_size, file_size(manifest, number, suffix))
            states.append(state(status))
    return np.array(states, dtype=np.int64).reshape(-1, 3)


def check_size(path: str | Path, size: int | None, expected: int) -> None:
    """Raises DataError unless a file has the length that the manifest implies; `size` is None if it is missing."""
    if size != expected:
        shown = "is missing" if size is None else f"has {size:,} bytes"
        raise DataError(
            f"{path} {shown}; the manifest says {expected:,} bytes.\n"
            "Copy the folder again, or make it again with prepare --overwrite."
        )


def file_size(manifest: Manifest, shard: int, suffix: str) -> int:
    row = manifest.shards.rows[shard]
    if suffix == ".bin":
        return int(row["tokens"]) * manifest.token_bytes
    documents = int(row["documents"])
    return own_index(documents).size if manifest.version > 2 else 8 * documents


def file_sha256(path: Path) -> str:
    """Checksum of a file, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state(status: os.stat_result) -> list[int]:
    """What changes when a file does: size in bytes, time in nanoseconds, inode."""
    return [status.st_size, status.st_mtime_ns, status.st_ino]


@contextmanager
def alone(folder: Path):
    """Lets one process at a time in, where the file system has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        logger.warning("%s cannot be locked (%s): each process compares it for itself", folder, error.strerror)
    try:
        yield
    finally:
        os.close(handle)

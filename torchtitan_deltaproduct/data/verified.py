"""Are the shards of a prepared folder still what `prepare` wrote? Looked at on first use, and whenever a file changed.

    check_shards(Path("data/code/train"), manifest)       # DataError names the file that differs

A size proves little: a restored, half-copied or foreign file of the same size holds other tokens. Checksums are
compared once; `.verified.json` in the folder (or, where that cannot be written, in the user's cache) then knows each
file by its size, time and inode. Processes that start together wait for the first one instead of reading it all again.
"""

import fcntl
import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.files import read_text

from .manifest import Manifest, write_atomically

NAME = ".verified.json"
THREADS = 8
TOLD_FROM = 1 << 30
"""Bytes from which on the log says what takes time."""

logger = logging.getLogger(__name__)


def check_shards(folder: Path, manifest: Manifest) -> None:
    """Compares every shard file with its checksum, unless that was done since it last changed.

    Raises:
        DataError: names the files that differ.
    """
    files = {
        shard.name + suffix: digest
        for shard in manifest.shards
        for suffix, digest in ((".bin", shard.bin_sha256), (".idx", shard.idx_sha256))
    }
    if not unknown(folder, files):
        return
    with alone(folder):
        todo = unknown(folder, files)
        size = sum((folder / name).stat().st_size for name in todo)
        if size >= TOLD_FROM:
            logger.info("%s: comparing %.1f GB with their checksums, once", folder, size / 1e9)
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            found = dict(zip(todo, pool.map(file_sha256, [folder / name for name in todo]), strict=True))
        if wrong := [str(folder / name) for name, digest in found.items() if digest != files[name]]:
            raise DataError(
                f"{len(wrong)} of {len(files)} files differ from their checksums: {', '.join(wrong[:3])}\n"
                "Copy them again, or make the folder again with prepare --overwrite."
            )
        remember(folder, {name: [digest, *state(folder / name)] for name, digest in files.items()})


def file_sha256(path: Path) -> str:
    """Checksum of a file, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unknown(folder: Path, files: dict[str, str]) -> list[str]:
    """The names whose file is not one that was compared with this checksum."""
    try:
        known = json.loads(read_text(memory(folder)))
        return [name for name, digest in files.items() if known.get(name) != [digest, *state(folder / name)]]
    except (OSError, ValueError, AttributeError, RecursionError):
        return list(files)


def state(path: Path) -> list[int]:
    """What changes when a file does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def memory(folder: Path) -> Path:
    """Where it is noted what was compared."""
    if os.access(folder, os.W_OK):
        return folder / NAME
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    key = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]
    return Path(cache, "torchtitan_deltaproduct", f"{key}{NAME}")


def remember(folder: Path, known: dict[str, list]) -> None:
    """Notes what was compared; without a place for it, the next start compares again."""
    try:
        memory(folder).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory(folder), json.dumps(known))
    except OSError as error:
        logger.warning("%s: that its files were compared cannot be noted (%s): each start does it again", folder, error)


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

"""complete.json, the commit marker of a checkpoint: written last, it lists every file with its size and SHA-256.

    {"format": "torchtitan-deltaproduct checkpoint", "version": 1, "step": 500, "time": 1764000000.0, "ranks": 8,
     "reason": "interval", "validation_loss": 2.31,
     "files": {"__0_0.distcp": {"bytes": 1232436, "sha256": "9f..."}, ".metadata": {...}}}

A folder without it is not a checkpoint, whatever else is in it. Sizes are compared whenever a folder is looked at;
checksums when a run resumes from it, when a model is loaded, and by `checkpoint.verify`. Whoever deletes a folder
removes the marker first. `.saving` says that a save of ours is under way, or was when it was killed.
"""

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..devices import cores
from ..errors import CheckpointError
from ..events import LATEST
from ..files import is_plain_name, is_there, read_text, write_atomically

MARKER, SAVING, INDEX = "complete.json", ".saving", ".metadata"
"""The commit marker, the sign that a save is under way, and DCP's index."""
HASHERS, BLOCK = 16, 1 << 20
"""Files that are hashed at once, at most, and the bytes of each that are read at a time."""
FORMAT, VERSION = "torchtitan-deltaproduct checkpoint", 1


@dataclass(frozen=True)
class Marker:
    """What complete.json says."""

    step: int
    time: float
    """Of the save, seconds since 1970."""
    ranks: int
    reason: str
    """`interval`, `last step`, `first step`, `SIGUSR1`, `walltime`, `import`, ..."""
    files: dict[str, tuple[int, str]]
    """Name -> (bytes, SHA-256)."""
    validation_loss: float | None = None
    """Held-out loss of these weights, nats; None: they were not validated, or it was not finite."""


def checksum(path: Path, tell: Callable[[int], object] = lambda size: None) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file; `tell` is called with the bytes of each block that was read."""
    size, digest = 0, hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
            tell(len(block))
    return size, digest.hexdigest()


def write_marker(folder: Path, marker: Marker) -> None:
    """Writes complete.json: whenever the machine stops, it is whole or absent."""
    files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(marker.files.items())}
    body = {"format": FORMAT, "version": VERSION, **vars(marker), "files": files}
    write_atomically(folder / MARKER, json.dumps(body, indent=1))
    # The rename lasts through a power cut then; not every file system can.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    (folder / SAVING).unlink(missing_ok=True)


def read_marker(folder: Path) -> Marker:
    """Reads complete.json; CheckpointError if it is missing, damaged, or of another format."""
    path = folder / MARKER
    try:
        body = json.loads(read_text(path))
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in body["files"].items()}
        version = body["version"] if body["format"] == FORMAT else "of another format"
        loss = body.get("validation_loss")
        loss = float(loss) if loss is not None and math.isfinite(loss) else None
        when = float(body["time"])
        if not abs(when) < LATEST:
            raise ValueError(f"time {when}")
        marker = Marker(int(body["step"]), when, int(body["ranks"]), str(body["reason"]), files, loss)
    except FileNotFoundError:
        raise CheckpointError(_missing(folder)) from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); use another checkpoint") from None
    if version != VERSION:
        raise CheckpointError(f"{path} has version {version}, expected {VERSION}: use the release that wrote it")
    if strange := [name for name in files if not is_plain_name(name)]:
        raise CheckpointError(f"{path} is damaged: {strange[0]!r} is no file of this folder; use another checkpoint")
    if INDEX not in files:
        raise CheckpointError(f"{path} is damaged: it does not list {INDEX}; use another checkpoint")
    return marker


def ours(folder: Path) -> bool:
    """Whether a folder was written, or begun, by this package: only such a one may be deleted."""
    if os.access(folder, os.X_OK) and is_there(folder / SAVING):
        return True
    try:
        # Another program's complete.json does not make it ours.
        return FORMAT in read_text(folder / MARKER, errors="replace")
    except OSError:
        return False


def wrong_sizes(folder: Path, marker: Marker) -> str:
    """The first file that is missing or has another size, in words; empty if there is none."""
    for name, (size, _) in sorted(marker.files.items()):
        try:
            status = (folder / name).stat()
        except OSError:
            return f"{name} is missing"
        # A pipe or a device would be waited for when it is read.
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is no file"
        if (now := status.st_size) != size:
            return f"{name} has {now:,} bytes of {size:,}"
    return ""


def wrong_checksums(
    folder: Path, marker: Marker, share: int = 0, shares: int = 1, tell: Callable[[int], object] = lambda size: None
) -> list[str]:
    """Files that are not what was written, in words; of all files the part `share` of `shares`, for ranks to divide.

    `tell` is that of `checksum`, called by several threads.
    """

    def problem(name: str) -> str:
        try:
            same = checksum(folder / name, tell) == marker.files[name]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return "" if same else f"{name} is not what was written (its checksum differs)"

    # Reading and hashing let other threads run; the ranks of a node share its cores.
    own = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with ThreadPoolExecutor(max(1, min(HASHERS, own)), thread_name_prefix="hashing") as pool:
        return list(filter(None, pool.map(problem, sorted(marker.files)[share::shares])))


def _missing(folder: Path) -> str:
    if is_there(folder / SAVING):
        return f"{folder} has no {MARKER}: its save is under way or was cut short"
    return f"{folder} has no {MARKER}: it is no checkpoint of this package, or its save never finished"

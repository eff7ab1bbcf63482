"""A run's checkpoint folders: which are complete, which is newest, which are kept.

A folder is complete when its marker (`marker.py`) reads and every file it lists is there with the listed size. Whoever
deletes a folder removes the marker first (`retire`), so that a half-deleted one is never taken for a checkpoint.

    for info in scan("outputs/run/checkpoint"): print(info.step, info.complete, info.reason)
    retention([100, 200, 300, 400], keep_latest_k=2, keep_every=200)      # {200: "...", 300: "...", 400: "..."}
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..files import is_there, read_text
from .marker import INDEX, MARKER, SAVING, Marker, read_marker, wrong_sizes

_STEP_FOLDER = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class CheckpointInfo:
    """One `step-N` folder.

    Attributes:
        complete: whether it can be used.
        reason: why it is not complete; empty if it is.
        size: bytes on disk.
        marker: None where there is none that reads.
    """

    step: int
    path: Path
    complete: bool
    reason: str
    size: int
    marker: Marker | None = None


def scan(folder: str | Path) -> list[CheckpointInfo]:
    """All `step-N` folders directly under `folder`, by step; other names are not ours and are left out.

    Raises:
        CheckpointError: `folder` is there and cannot be listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    try:
        paths = list(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}; make it readable") from None
    matches = ((_STEP_FOLDER.fullmatch(path.name), path) for path in paths if path.is_dir())
    return sorted((inspect(path, int(m[1])) for m, path in matches if m), key=lambda info: info.step)


def inspect(path: Path, step: int | None = None) -> CheckpointInfo:
    """Compares a folder with its marker; reads no data.

    Args:
        path: the folder.
        step: that its name says; None: whatever the marker says (0 if none reads).
    """
    size = folder_size(path)
    try:
        marker = read_marker(path)
    except CheckpointError as error:
        return CheckpointInfo(step or 0, path, False, str(error), size)
    reason = wrong_sizes(path, marker)
    if not reason and step not in (None, marker.step):
        reason = f"its marker says step {marker.step}: the folder was renamed"
    return CheckpointInfo(marker.step if step is None else step, path, not reason, reason, size, marker)


def folder_size(path: Path) -> int:
    """Bytes of all files below a folder, which may vanish meanwhile, in part or whole."""
    total = 0
    # os.walk passes over folders that are gone; pathlib's rglob raises.
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return total


def is_hf_folder(path: Path) -> bool:
    """Whether a folder has a config.json of a Hugging Face model (a run's config.json is of another kind)."""
    try:
        content = json.loads(read_text(path / "config.json"))
    except (OSError, ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        return "config" not in content
    return any((path / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))


def latest_complete(folder: str | Path) -> CheckpointInfo | None:
    """The newest complete checkpoint under `folder`, or None."""
    return next((info for info in reversed(scan(folder)) if info.complete), None)


def retention(complete: Iterable[int], keep_latest_k: int, keep_every: int = 0) -> dict[int, str]:
    """Which of the complete steps are kept, and why.

    Args:
        complete: steps of the complete checkpoints.
        keep_latest_k: so many of the newest are kept; 0: all.
        keep_every: steps divisible by it are milestones and always kept; 0: there are none.

    Returns:
        step -> reason; a step that is not in it may go. The newest is always in it.
    """
    newest_first = sorted(set(complete), reverse=True)
    kept = {}
    for place, step in enumerate(newest_first, start=1):
        if place == 1:
            kept[step] = "the newest"
        elif keep_latest_k <= 0:
            kept[step] = "all are kept"
        elif place <= keep_latest_k:
            kept[step] = f"one of the newest {keep_latest_k}"
        elif keep_every > 0 and step and step % keep_every == 0:
            kept[step] = f"milestone, every {keep_every:,} steps"
    return kept


def deletable(checkpoints: Iterable[CheckpointInfo], keep_latest_k: int, keep_every: int = 0) -> list[CheckpointInfo]:
    """What retention deletes: complete folders not kept, and what cut-short saves older than the newest left.

    Never the last complete one, and nothing that this package did not write: a link to a folder was made by someone.
    """
    checkpoints = list(checkpoints)
    complete = [info for info in checkpoints if info.complete]
    kept = retention((info.step for info in complete), keep_latest_k, keep_every)
    newest = max((info.step for info in complete), default=-1)
    return [
        info
        for info in checkpoints
        if not info.path.is_symlink()
        and (info.step not in kept if info.complete else info.step < newest and cut_short(info.path))
    ]


def cut_short(path: Path) -> bool:
    """Whether a save of ours began here and never ended; not one that ended and whose marker does not read now."""
    return is_there(path / SAVING) and not is_there(path / MARKER)


def was_complete(path: Path) -> bool:
    """Whether a folder was a checkpoint once: it has a marker that may not read, or has lost the one it had.

    A save leaves `.saving` until its marker is written, and whoever deletes puts it back first.
    """
    return is_there(path / MARKER) or (is_there(path / INDEX) and not is_there(path / SAVING))


def retire(path: Path) -> None:
    """Takes the commit marker off a folder, so that it no longer counts as a checkpoint; it stays ours to delete."""
    (path / SAVING).touch()
    (path / MARKER).unlink(missing_ok=True)


def delete(path: Path) -> None:
    """Deletes a checkpoint folder: the marker first, and last what says that it was ours.

    Raises:
        OSError: something of it could not be deleted; it no longer counts as a checkpoint.
    """
    if path.is_symlink():
        # What it leads to is not ours: someone moved it there.
        path.unlink()
        return
    if not path.exists():
        return
    retire(path)
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name != SAVING:
            child.unlink()
    (path / SAVING).unlink()
    path.rmdir()

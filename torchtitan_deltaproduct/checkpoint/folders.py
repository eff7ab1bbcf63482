"""A run's checkpoint folders: which are complete, which is newest, which may go.

DCP writes `.metadata` last and by rename, so it is the commit marker; it also lists every data file with the bytes it
must hold. A folder is complete when the index reads and no file is missing or short. Whoever deletes a folder removes
the marker first (`retire`), so that a half-deleted one is never taken for a checkpoint.

    for info in scan("outputs/run/checkpoint"): print(info.step, info.complete, info.reason)
"""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .safe_dcp import read_index

_STEP_FOLDER = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class CheckpointInfo:
    """One `step-N` folder: `reason` says why it is not complete (empty if it is); sizes in bytes."""

    step: int
    path: Path
    complete: bool
    reason: str
    size: int


def scan(folder: str | Path) -> list[CheckpointInfo]:
    """All `step-N` folders directly under `folder`, by step; other names are not ours and are left out."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    matches = ((_STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((inspect(path, int(m[1])) for m, path in matches if m), key=lambda info: info.step)


def inspect(path: Path, step: int) -> CheckpointInfo:
    """Compares a folder with its own index."""
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    try:
        index = read_index(path)
    except CheckpointError as error:
        return CheckpointInfo(step, path, False, str(error), size)
    needed: dict[str, int] = {}
    for info in (index.storage_data or {}).values():
        end = info.offset + info.length
        needed[info.relative_path] = max(end, needed.get(info.relative_path, 0))
    for name, length in sorted(needed.items()):
        file = path / name
        found = file.stat().st_size if file.is_file() else -1
        if found < length:
            what = "is missing" if found < 0 else f"has {found:,} bytes of {length:,}"
            return CheckpointInfo(step, path, False, f"{name} {what}", size)
    return CheckpointInfo(step, path, True, "", size)


def latest_complete(folder: str | Path) -> CheckpointInfo | None:
    """The newest complete checkpoint under `folder`, or None."""
    return next((info for info in reversed(scan(folder)) if info.complete), None)


def stale_steps(complete: Iterable[int], keep_latest_k: int) -> list[int]:
    """Steps to delete so that the newest `keep_latest_k` complete ones remain; 0 keeps all."""
    return sorted(complete)[:-keep_latest_k] if keep_latest_k > 0 else []


def retire(path: Path) -> None:
    """Takes the commit marker off a folder, so that it no longer counts as a checkpoint."""
    (path / ".metadata").unlink(missing_ok=True)


def delete(path: Path) -> None:
    """Deletes a checkpoint folder, marker first."""
    retire(path)
    shutil.rmtree(path, ignore_errors=True)

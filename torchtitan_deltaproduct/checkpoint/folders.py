"""A run's checkpoint folders: which are complete, which is newest, which are kept.

A folder is complete when its marker (`marker.py`) reads and every file it lists is there with the listed size. Whoever
deletes a folder removes the marker first (`retire`), so that a half-deleted one is never taken for a checkpoint.

    for info in scan("outputs/run/checkpoint"): print(info.step, info.complete, info.reason)
    Retention("outputs/run/checkpoint", keep_latest_k=2).surplus()        # what to delete after a save
    retention([100, 200, 300, 400], keep_latest_k=2, keep_every=200)      # {200: "...", 300: "...", 400: "..."}

Which checkpoints are the best by validation is read from their markers (`best_steps`), which hold the loss: there is no
other record of it that could disagree.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config.snapshots import read_snapshot
from ..errors import CheckpointError
from ..files import is_there, read_text
from .marker import INDEX, MARKER, SAVING, Marker, read_marker, wrong_sizes

_STEP_FOLDER = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class CheckpointInfo:
    """One `step-N` folder: whether it is complete, so that it can be used, and the reason if it is not."""

    step: int
    path: Path
    complete: bool
    reason: str
    marker: Marker | None = None
    """None where there is none that reads."""

    @property
    def size(self) -> int:
        """Bytes of all files below the folder, which may vanish meanwhile, in part or whole."""
        total = 0
        # os.walk passes over folders that are gone; pathlib's rglob raises.
        for folder, _, names in os.walk(self.path):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.stat(os.path.join(folder, name)).st_size
        return total


def step_folders(folder: str | Path) -> list[tuple[int, Path]]:
    """The `step-N` folders in `folder`, newest first, by name; CheckpointError if it is there and cannot be listed."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    try:
        with os.scandir(folder) as entries:
            matches = [(_STEP_FOLDER.fullmatch(entry.name), entry) for entry in entries]
            found = [(int(match[1]), folder / entry.name) for match, entry in matches if match and entry.is_dir()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}; make it readable") from None
    return sorted(found, reverse=True)


def scan(folder: str | Path) -> list[CheckpointInfo]:
    """All `step-N` folders in `folder`, by step, each with a look at all of its files; errors as `step_folders`."""
    return [inspect(path, step) for step, path in reversed(step_folders(folder))]


def newest_first(folder: str | Path, step: int = -1) -> Iterator[CheckpointInfo]:
    """The `step-N` folders, each looked into only when it is asked for; of `step` alone unless that is -1."""
    return (inspect(path, number) for number, path in step_folders(folder) if step in (-1, number))


def no_such_step(folder: str | Path, asked: int, reason: str = "") -> str:
    """Says that `checkpoint.load_step` names no complete step of `folder`, for which reason, and which there are."""
    have = ", ".join(str(info.step) for info in scan(folder) if info.complete)
    return (
        f"checkpoint.load_step = {asked}, but {folder} has no complete step {asked}{': ' if reason else ''}{reason}\n"
        f"complete steps there: {have or 'none'}; name one of them, or leave load_step out for the newest"
    )


def inspect(path: Path, step: int | None = None) -> CheckpointInfo:
    """Compares a folder with its marker; reads no data.

    `step` is that of its name; None: whatever the marker says (0 if none reads).
    """
    try:
        marker = read_marker(path)
    except CheckpointError as error:
        return CheckpointInfo(step or 0, path, False, str(error))
    reason = wrong_sizes(path, marker)
    if not reason and step not in (None, marker.step):
        reason = f"its marker says step {marker.step}: the folder was renamed"
    return CheckpointInfo(marker.step if step is None else step, path, not reason, reason, marker)


def checkpoint_folder(run: Path) -> tuple[Path, dict]:
    """Where the `step-N` of a run are, if it has any, and its `[checkpoint]` settings; {} if they are not known."""
    snapshot = read_snapshot(run / "config.json")
    settings = {} if snapshot is None else snapshot["config"].get("checkpoint", {})
    return run / settings.get("folder", "checkpoint"), settings


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
    return next((info for info in newest_first(folder) if info.complete), None)


def best_steps(checkpoints: Iterable[CheckpointInfo], count: int) -> list[int]:
    """Steps of the complete checkpoints with the lowest held-out loss, the best first; of equal ones the earlier."""
    losses = [(info.marker.validation_loss, info.step) for info in checkpoints if info.complete and info.marker]
    return [step for loss, step in sorted(pair for pair in losses if pair[0] is not None)][:count]


def retention(
    complete: Iterable[int], keep_latest_k: int, keep_every: int = 0, best: Collection[int] = ()
) -> dict[int, str]:
    """Which of the complete steps are kept, and why: step -> reason. One that is not in it may go; the newest is.

    Kept are `keep_latest_k` of the newest (0: all), milestones, which are divisible by `keep_every` (0: none), and the
    `best` by validation.
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
        if step in best:
            kept[step] = f"{kept[step]}; the best by validation" if step in kept else "the best by validation"
    return kept


def deletable(
    checkpoints: Iterable[CheckpointInfo], keep_latest_k: int, keep_every: int = 0, keep_best: int = 0
) -> list[CheckpointInfo]:
    """What retention deletes: complete folders not kept, and what cut-short saves older than the newest left.

    Never the last complete one, and nothing that this package did not write: a link to a folder was made by someone.
    """
    checkpoints = list(checkpoints)
    complete = [info for info in checkpoints if info.complete]
    kept = retention((info.step for info in complete), keep_latest_k, keep_every, best_steps(complete, keep_best))
    newest = max((info.step for info in complete), default=-1)
    return [
        info
        for info in checkpoints
        if not info.path.is_symlink()
        and (info.step not in kept if info.complete else info.step < newest and cut_short(info.path))
    ]


class Retention:
    """What to delete after each save of one launch, as `retention` says; no complete folder is looked through twice."""

    def __init__(self, folder: str | Path, keep_latest_k: int, keep_every: int = 0, keep_best: int = 0) -> None:
        self.folder, self.keep_latest_k, self.keep_every, self.keep_best = folder, keep_latest_k, keep_every, keep_best
        self.known: dict[Path, CheckpointInfo] = {}

    def surplus(self) -> list[CheckpointInfo]:
        """What `deletable` says of the folders as they are now.

        A folder known to be complete stays so while its marker is there. One that is kept whatever its files are like
        (a milestone, say) is not looked into, unless the best are to be known.
        """
        checkpoints, complete = [], 0
        for step, path in step_folders(self.folder):
            always_kept = self.keep_latest_k <= 0 or (self.keep_every > 0 and step and step % self.keep_every == 0)
            if not is_there(path / MARKER):
                info = CheckpointInfo(step, path, False, "no marker")
            elif path in self.known:
                info = self.known[path]
            elif always_kept and not self.keep_best and complete >= max(self.keep_latest_k, 1):
                info = CheckpointInfo(step, path, True, "")
            else:
                info = inspect(path, step)
            checkpoints.append(info)
            complete += info.complete
        self.known = {info.path: info for info in checkpoints if info.complete and info.marker is not None}
        return deletable(checkpoints, self.keep_latest_k, self.keep_every, self.keep_best)


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


def set_aside(path: Path, why: str) -> Path:
    """Renames a folder to `NAME.WHY-1`, or the first number that is free; returns the new path."""
    numbers = itertools.count(1)
    aside = next(free for number in numbers if not is_there(free := path.with_name(f"{path.name}.{why}-{number}")))
    return path.rename(aside)


def delete(path: Path) -> None:
    """Deletes a checkpoint folder: the marker first, and last what says that it was ours.

    After an OSError, of something that could not be deleted, it no longer counts as a checkpoint.
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

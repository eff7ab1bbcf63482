"""One launch at a time in a run folder: RUN/owner/1.json says who trains there; two would mix checkpoints and metrics.

    with RunLock("outputs/run"):           # rank 0 of a launch; ConfigError names the launch that is there already
        ...

    {"host": "n1", "pid": 4711, "boot": "9c...", "namespace": "pid:[...]", "start": 123456, "slurm_job": "51960", ...}

The file with the highest number is the owner's. It is made with O_EXCL, which is atomic on network file systems too,
and never changed: its heartbeat is its modification time, set by the file server's clock. Whoever finds an owner that
is surely gone makes the next number, so that of several at most one succeeds. An owner is gone if its process is (on
the same machine), if SLURM or torchrun started this launch in its place, or if its heart did not beat for `SILENT`
seconds while it was watched. One that was only frozen finds the higher number when it wakes, and ends.
"""

import errno
import json
import logging
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError
from ..events import is_restart, started_by
from ..files import is_there, read_object

logger = logging.getLogger(__name__)

FOLDER = "owner"
BEAT, SILENT = 5.0, 60.0
"""Seconds between two beats, and without one after which an owner on another machine is gone."""
EXIT_TAKEN_OVER = 2
"""Exit code of an owner that finds itself replaced: as of a refusal, after which launchers do not start it again."""


class RunLock:
    """Holds a run folder while it is entered; see the module.

    Args:
        run: the run folder, made if need be.
    """

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        self.folder = self.run / FOLDER
        self.path: Path | None = None
        self.is_new = not is_there(self.run)
        self.released = threading.Event()

    def __enter__(self) -> "RunLock":
        while self.path is None:
            try:
                self._try_to_take()
            except OSError as error:
                why = "a file is in the way" if isinstance(error, NotADirectoryError | FileExistsError) else error
                raise ConfigError(
                    f"the run folder {self.run} cannot be written: {why}\n"
                    "choose another job.dump_folder, or make this one writable"
                ) from None
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.released.set()
        with suppress(OSError):
            self.path.unlink()
            self.folder.rmdir()
            if self.is_new:
                # Goes if nothing came into it: a launch that was refused leaves no trace.
                self.run.rmdir()

    def _try_to_take(self) -> None:
        """Takes the next number if nobody holds the folder; leaves `path` None if another was quicker.

        Raises:
            ConfigError: another launch holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        taken = numbers(self.folder)
        if taken:
            refuse_living(self.run, self.folder / f"{taken[-1]}.json")
        path = self.folder / f"{taken[-1] + 1 if taken else 1}.json"
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except (FileExistsError, FileNotFoundError):
            # Another launch took the number, or gave the folder back and removed it, in this very moment.
            return
        try:
            os.write(handle, json.dumps(identity()).encode())
        except OSError:
            # A full disk: an owner whose file does not read would be watched for a minute.
            path.unlink()
            raise
        finally:
            os.close(handle)
        if numbers(self.folder)[-1] != int(path.stem):
            # Others took this number and the next since the folder was listed.
            path.unlink()
            return
        self.path = path
        for number in taken:
            (self.folder / f"{number}.json").unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self.released.wait(BEAT):
            try:
                os.utime(self.path)
                lost = numbers(self.folder)[-1:] != [int(self.path.stem)]
            except OSError as error:
                lost = error.errno in (errno.ENOENT, errno.ESTALE)
                # Otherwise the file server does not answer: it may again, and others hear nothing from it either.
            if lost and not self.released.is_set():
                others = sorted(self.folder.glob("*.json"))
                if others:
                    what = f"was taken over by {describe(read(others[0]))}: this launch was taken for dead"
                else:
                    what = (
                        "is no longer what this launch began: its folder was moved or deleted, or its owner's file was"
                    )
                print(f"error: {self.run} {what}, and ends", file=sys.stderr, flush=True)
                os._exit(EXIT_TAKEN_OVER)


def numbers(folder: Path) -> list[int]:
    """Numbers of the owners' files, the holder's last."""
    return sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal())


def refuse_living(run: Path, path: Path) -> None:
    """Raises ConfigError unless the owner that `path` tells of is surely gone, or gave the folder back meanwhile."""
    owner = read(path)
    gone = is_gone(owner, identity())
    if gone is None:
        logger.warning("%s is held by %s, which cannot be seen from here: watching it for up to %.0f s",
                       run, describe(owner), SILENT)  # fmt: skip
        gone = falls_silent(path)
    if not gone:
        raise ConfigError(
            f"{run} is in use by another launch: {describe(owner)}\n"
            "wait for it, stop it (its checkpoint is then continued), or train in another job.dump_folder"
        )
    logger.info("the launch before, %s, is gone", describe(owner))


def is_gone(owner: dict, own: dict) -> bool | None:
    """Whether the owner's process is gone, as far as that can be known from here; None: it cannot.

    Args:
        owner: `identity` of the owner; {} if its file does not read.
        own: that of this process.
    """
    if own["boot"] and (own["boot"], own["namespace"]) == (owner.get("boot"), owner.get("namespace")):
        # Seen from here, the process itself answers: two launches may have been given one name by their user.
        start = start_of(owner["pid"])
        if start is not None:
            return start != owner["start"]
    return True if is_restart(own, owner) else None


def falls_silent(path: Path) -> bool:
    """Watches an owner's file: whether it stays unchanged for `SILENT` seconds, or goes away."""
    try:
        first, end = beat_of(path), time.monotonic() + SILENT
        while time.monotonic() < end:
            time.sleep(min(1.0, SILENT / 10))
            if beat_of(path) != first:
                return False
    except FileNotFoundError:
        pass
    return True


def beat_of(path: Path) -> int:
    """When the file changed last; opened anew, because network file systems then ask their server."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def identity() -> dict:
    """This process, told apart from every other, and what started it."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": _line("/proc/sys/kernel/random/boot_id"),
        "namespace": os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else "",
        "start": start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        **started_by(),
    }


def start_of(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the boot; 0 if none runs; None if it cannot be seen."""
    # The name, in parentheses, may hold blanks; state and start time are fields 3 and 22 of proc(5).
    fields = _line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if fields:
        return 0 if fields[0] in "ZX" else int(fields[19])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return 0
    except OSError:
        pass
    return None


def describe(owner: dict) -> str:
    """`process 4711 on n1 since 2026-11-26 11:24:32 (SLURM job 519605)`."""
    job = f" (SLURM job {owner['slurm_job']})" if owner.get("slurm_job") else ""
    if not owner.get("pid"):
        return "a launch whose file does not read"
    return f"process {owner['pid']} on {owner.get('host')} since {owner.get('since')}{job}"


def read(path: Path) -> dict:
    """What an owner wrote; {} if it does not read (its disk was full, or it has only just begun)."""
    content = read_object(path)
    types = {name: type(value) for name, value in identity().items()}
    return content if all(type(content.get(name)) is types[name] for name in types) else {}


def _line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""

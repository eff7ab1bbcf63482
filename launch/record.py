"""What a launch leaves in the run folder, so that it can be told later what ran: RUN/launch/001, 002, ...

    folder = new_folder(run)               # RUN/launch/003
    record(folder, Path("train_configs/x.toml"), ["--training.steps", "100"], command)

    x.toml          the TOML as it was; the job reads this copy, so that editing the original changes nothing queued
    overrides.json  the command line's settings
    git.txt         revision and changed files; git.diff: what the changes are
    packages.txt    every installed package, as pip freeze lists them
    env.json        who, where, when, with which versions
    code/           the packages of this project as they were; the job runs this copy, for the same reason
"""

import getpass
import os
import platform
import shlex
import shutil
import socket
import sys
import time
from importlib import metadata
from pathlib import Path

from torchtitan_deltaproduct.config.snapshots import REVISION, versions
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.files import write_json

from .sbatch import ROOT, ask

CODE = "code"
PACKAGES = ("torchtitan_deltaproduct", "launch", "eval")


def next_folder(run: Path) -> Path:
    """The folder that the next launch of a run will get."""
    taken = [int(path.name) for path in run.glob("launch/[0-9]*") if path.name.isdecimal()]
    return run / "launch" / f"{max(taken, default=0) + 1:03d}"


def new_folder(run: Path) -> Path:
    """Makes the folder of a launch; two launches at once get two."""
    while True:
        folder = next_folder(run)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"{folder} cannot be made: {error.strerror}; choose another job.dump_folder") from None


def record(folder: Path, config: Path, overrides: list[str], command: list[str]) -> None:
    """Writes the files listed above.

    Args:
        folder: of the launch.
        config: the TOML that was named.
        overrides: `--section.key value` words.
        command: the words the user typed.
    """
    shutil.copyfile(config, folder / config.name)
    snapshot_code(folder)
    write_json(folder / "overrides.json", overrides)
    write_json(folder / "env.json", {
        "command": shlex.join(command),
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        "user": user(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "platform": platform.platform(),
        "python": sys.executable,
        "versions": versions(),
    })  # fmt: skip
    packages = {f"{package.metadata['Name']}=={package.version}" for package in metadata.distributions()}
    lines = "".join(f"{line}\n" for line in sorted(packages, key=str.lower))
    (folder / "packages.txt").write_text(lines, encoding="utf-8")
    revision = git("log", "-1", "--format=%H %cI %s") + git("status", "--short")
    (folder / "git.txt").write_text(revision, encoding="utf-8")
    if changes := git("diff", "HEAD"):
        (folder / "git.diff").write_text(changes, encoding="utf-8")


def snapshot_code(folder: Path) -> None:
    """Copies this project's packages to folder/code, with changes that are not committed, and notes the revision."""
    code = folder / CODE
    shutil.rmtree(code, ignore_errors=True)
    for name in PACKAGES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (code / REVISION).write_text(versions().get("git", "") + "\n", encoding="utf-8")


def user() -> str:
    """The user's name, or number where none is known: in a container, say."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def git(*command: str) -> str:
    """What git says of this checkout; "" where it is none, or there is no git."""
    try:
        done = ask("git", "-C", str(ROOT), *command)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""

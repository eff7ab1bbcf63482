"""What a launch leaves in the run folder, so that it can be told later what ran: RUN/launch/001, 002, ...

    folder = new_folder(run)               # RUN/launch/003
    record(folder, Path("train_configs/x.toml"), ["--training.steps", "100"], command)

    x.toml          the TOML as it was; the job reads this copy, so that editing the original changes nothing queued
    overrides.json  the command line's settings
    git.txt         revision and changed files; git.diff: what the changes are
    packages.txt    every installed package, as pip freeze lists them
    env.json        who, where, when, with which versions
"""

import getpass
import json
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from torchtitan_deltaproduct.config.snapshots import versions

from .sbatch import ROOT


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


def record(folder: Path, config: Path, overrides: list[str], command: list[str]) -> None:
    """Writes the files listed above.

    Args:
        folder: of the launch.
        config: the TOML that was named.
        overrides: `--section.key value` words.
        command: the words the user typed.
    """
    shutil.copyfile(config, folder / config.name)
    write_json(folder / "overrides.json", overrides)
    write_json(folder / "env.json", {
        "command": shlex.join(command),
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        "user": getpass.getuser(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "platform": platform.platform(),
        "python": sys.executable,
        "versions": versions(),
    })  # fmt: skip
    packages = {f"{found.metadata['Name']}=={found.version}" for found in metadata.distributions()}
    (folder / "packages.txt").write_text("".join(f"{line}\n" for line in sorted(packages, key=str.lower)))
    (folder / "git.txt").write_text(git("log", "-1", "--format=%H %cI %s") + git("status", "--short"))
    if changes := git("diff", "HEAD"):
        (folder / "git.diff").write_text(changes)


def git(*command: str) -> str:
    """What git says of this checkout; "" where it is none, or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

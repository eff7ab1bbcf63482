"""The settings of a run as JSON: in its folder and beside every checkpoint, to know the model and to compare launches.

    write_snapshot(folder / "config.json", snapshot(config))
    read_snapshot(folder / "config.json")["config"]["model"]["num_householder"]

Reading needs no torchtitan: evals and `status` start without it.
"""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..files import read_text, write_atomically

if TYPE_CHECKING:
    from .job import JobConfig

REVISION = "REVISION"
"""File beside a copy of this package with the git revision it was copied from."""


def snapshot(config: "JobConfig", extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The resolved config and what produced it, ready for JSON.

    Args:
        config: A loaded config.
        extra: More to record. `data_identity` (any JSON value, such as the checksum of the manifests) tells
            data that moved from data that changed; `world_size` replaces the environment's.
    """
    extra = dict(extra or {})
    world_size = int(extra.pop("world_size", os.environ.get("WORLD_SIZE", "1")))
    derived = {
        "world_size": world_size,
        "global_batch_size": config.training.samples_per_step(config.data_ranks(world_size)),
        "mlp_size": config.model.mlp_size,
    }
    content = {"config": config.to_dict(), "derived": derived, "versions": versions(), "extra": extra}
    return json.loads(json.dumps(content))


def versions() -> dict[str, str]:
    """Versions of what computes, and the git revision of this package where it runs from a checkout."""
    installed = {"python": platform.python_version()}
    for name in ("torch", "torchtitan", "torchtitan-deltaproduct", "flash-linear-attention", "triton"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if revision := _git_revision():
        installed["git"] = revision
    return installed


def write_snapshot(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Writes a snapshot; whenever the process dies, `path` is the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_snapshot(path: str | os.PathLike) -> dict[str, Any] | None:
    """The snapshot in a file; None if there is no such file.

    Raises:
        CheckpointError: The file is not a snapshot.
    """
    try:
        content = json.loads(read_text(path))
        if isinstance(content, dict) and isinstance(content.get("config"), dict):
            return content
        reason = 'it has no "config"'
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        reason = str(error)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; expected the settings of a run") from None
    raise CheckpointError(f"{path} is not a config snapshot: {reason}; delete it to skip the comparison")


def _git_revision() -> str | None:
    package = Path(__file__).resolve().parents[1]
    copied = package.parent / REVISION
    if copied.is_file():
        return copied.read_text(encoding="utf-8").strip() or None
    if not (package.parent / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None

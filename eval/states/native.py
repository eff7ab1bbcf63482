"""C beside this module, compiled for this machine's processor when it is first needed.

    library = load("singular_values")          # eval/states/singular_values.c as a ctypes library
    library = load("no_such_thing")            # None, after one warning that says why

The shared object is kept in $TORCH_EXTENSIONS_DIR or ~/.cache/torchtitan_deltaproduct under a name drawn from the
source, the compiler and the instructions it may use, so that machines of different kinds can share a home.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared")

logger = logging.getLogger(__name__)


@lru_cache
def load(name: str) -> ctypes.CDLL | None:
    """The library of `name`.c; None where it cannot be compiled or loaded."""
    source = Path(__file__).with_name(f"{name}.c")
    try:
        return ctypes.CDLL(str(_compiled(source)))
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or ["no reason given"]
        reason = next((line for line in lines if "error" in line), lines[0])
        logger.warning("%s is not compiled, the slower PyTorch is used: %s", source.name, reason)
        return None


def _compiled(source: Path) -> Path:
    """Where the shared object of a source is, made if need be.

    Raises:
        OSError: there is no compiler, or no place to write. subprocess.SubprocessError: it failed.
    """
    asked = os.environ.get("CC", "")
    compiler = shutil.which(asked) if asked else shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise OSError(f"there is no C compiler {asked or 'gcc'}")
    # What -march=native stands for here is among the macros.
    macros = _run([compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull])
    key = hashlib.sha256("\0".join([source.read_text(), macros, *FLAGS]).encode()).hexdigest()[:16]
    target = _folder() / f"{source.stem}-{key}.so"
    if not target.exists():
        temporary = target.with_name(f"{target.name}.tmp{os.getpid()}")
        _run([compiler, *FLAGS, str(source), "-o", str(temporary), "-lm"])
        os.replace(temporary, target)
    return target


def _folder() -> Path:
    """A folder that this user can write to; one that ends with the process if there is none at home."""
    home = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "torchtitan_deltaproduct"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _temporary_folder()


@lru_cache
def _temporary_folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="torchtitan_deltaproduct-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory] = []
"""Removed when the process ends."""


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout

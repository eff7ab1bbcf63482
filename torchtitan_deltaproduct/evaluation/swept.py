"""What a sweep must know of an evaluation: a module of this package with a `SWEPT` can be named in a sweep's TOML.

SWEPT = Swept("state_tracking", metrics, parse)
made_by(arguments, loaded)           # goes into the results, so that they themselves say whether a job is done
"""

import contextlib
import hashlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_deltaproduct.checkpoint.folders import is_hf_folder
from torchtitan_deltaproduct.checkpoint.load import LoadedModel, find_checkpoint
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.files import read_text

from .files import DAMAGE


def checkpoint_of(path: str | Path, step: int | None = None) -> str:
    """What the weights of a model are, as text that changes when they do; CheckpointError if there are none (yet)."""
    path = Path(path)
    if path.is_dir() and is_hf_folder(path):
        files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in path.glob("*.*"))
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    info = find_checkpoint(path, step)
    return f"step {info.step}, saved {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(info.marker.time))}"


def made_by(arguments: list[str], loaded: list[LoadedModel]) -> dict[str, Any]:
    """By which command results were made, of which weights."""
    return {"arguments": arguments, "checkpoints": [checkpoint_of(model.run, model.step) for model in loaded]}


@dataclass(frozen=True)
class Swept:
    """One evaluation as a sweep sees it."""

    name: str
    """Of its command and of its file of results."""
    metrics: Callable[[Path], dict[str, float | None]]
    """From the folder of its results to names and values (None where there is none)."""
    parse: Callable[[list[str]], Any] | None = None
    """Its command line's parser, which says what is wrong with options."""
    reads_data: bool = False
    """It reads datasets: one job for each model and dataset, else one for each model."""
    compare: Callable[[list[Path], list[str], Path], None] | None = None
    """From the files of results of several models, their names and a folder to pictures of all."""

    def words(self, model: str, step: int | None, data: str, out: Path, options: dict[str, Any]) -> list[str]:
        """The arguments of a job."""
        return [model, *(["--step", str(step)] if step is not None else []), *(["--data", data] if data else []),
                "--out", str(out), *self.flags(options)]  # fmt: skip

    def flags(self, options: dict[str, Any], dash: str = "-") -> list[str]:
        """Keys and values as options of a command line: true is a flag, a list several values."""
        words = []
        for key, value in options.items():
            if value is not False:
                values = [] if value is True else value if isinstance(value, list) else [value]
                words += [f"--{key.replace('_', dash)}", *map(str, values)]
        return words

    def refusal(self, options: dict[str, Any], data: str) -> str:
        """What its own command line says against options, or ""."""
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                self.parse(["model", *(["--data", data or "x"] if self.reads_data else []), *self.flags(options)])
        except SystemExit:
            lines = complaint.getvalue().strip().splitlines()
            return lines[-1].partition("error: ")[2] if lines else "an option is wrong"
        except ConfigError as error:
            return str(error).splitlines()[0]
        return ""

    def made_by(self, folder: Path) -> dict[str, Any]:
        """`made_by` of the results in a folder; {} if there are none."""
        try:
            return json.loads(read_text(folder / f"{self.name}.json"))["made_by"]
        except DAMAGE:
            return {}

"""From a sweep's TOML to its jobs: one for each (eval, model, dataset), with the command that does it.

    sweep = read_sweep(Path("eval/example_sweep.toml"))
    for job in sweep.jobs: print(job.name, job.command)

A job is done when its folder has done.json, written after its command ended well, for the same command and the same
weights: a newer checkpoint, or another option, makes it due again.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import sys
import time
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torchtitan_deltaproduct.checkpoint.folders import is_hf_folder
from torchtitan_deltaproduct.checkpoint.load import find_checkpoint
from torchtitan_deltaproduct.config.locate import locate
from torchtitan_deltaproduct.config.values import nearest
from torchtitan_deltaproduct.data.manifest import write_atomically
from torchtitan_deltaproduct.errors import CheckpointError, ConfigError
from torchtitan_deltaproduct.files import read_text

ON_DATA = ("length_extrapolation", "effective_rank")
"""Evals that read datasets: one job for each model and dataset."""
ON_MODELS = ("state_tracking", "lm_harness")
"""Evals without: one job for each model."""
EVALS = ON_DATA + ON_MODELS
OUT = {"lm_harness": "--output_path"}
"""Evals whose option for the folder of results is not --out."""
RESERVED = ("models", "data", "out", "output_path", "step", "from", "model_args", "model")
NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Model:
    """A model of the sweep: its name there, where it is, and the step asked for (None: the newest complete one)."""

    name: str
    path: str
    step: int | None = None

    @cached_property
    def checkpoint(self) -> str:
        """What its weights are, as text that changes when they do.

        Raises:
            CheckpointError: there is none (yet).
        """
        path = Path(self.path)
        if path.is_dir() and is_hf_folder(path):
            files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in path.glob("*.*"))
            return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
        info = find_checkpoint(path, self.step)
        return f"step {info.step}, saved {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(info.marker.time))}"


@dataclass(frozen=True)
class Job:
    """One eval of one model, on one dataset or none.

    Attributes:
        name: `length_extrapolation/DP2/code`, also its folder below the sweep's.
        eval: the eval.
        model: the model.
        data: name of the dataset; empty for evals without.
        folder: for results, log.txt and done.json.
        command: words to run.
    """

    name: str
    eval: str
    model: Model
    data: str
    folder: Path
    command: list[str]

    def obstacle(self) -> str:
        """Why it cannot run now, or ""."""
        try:
            _ = self.model.checkpoint
        except CheckpointError as error:
            return str(error).splitlines()[0]
        return ""

    def is_done(self) -> bool:
        """Whether its results are there, for this command and these weights."""
        try:
            return json.loads(read_text(self.folder / "done.json")) == self.record()
        except (OSError, ValueError, CheckpointError):
            return False

    def record(self) -> dict[str, Any]:
        return {"command": self.command[1:], "checkpoint": self.model.checkpoint}

    def finish(self) -> None:
        """Notes that it is done."""
        write_atomically(self.folder / "done.json", json.dumps(self.record(), indent=1) + "\n")


@dataclass(frozen=True)
class Sweep:
    """A sweep.

    Attributes:
        file: its TOML.
        out: the folder of everything it makes.
        jobs: all of them, in the order of the file.
    """

    file: Path
    out: Path
    jobs: list[Job]


def read_sweep(file: Path) -> Sweep:
    """Reads and checks a sweep's TOML; see eval/example_sweep.toml.

    Raises:
        ConfigError: all that is wrong with it.
    """
    try:
        text = read_text(file)
        tree = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; expected a sweep, such as eval/example_sweep.toml") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start:,}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None
    lines, problems = locate(text), []

    def wrong(where: tuple[str, ...], what: str) -> None:
        problems.append(f"{file}:{lines.get(where, 1)}: {what}")

    for key in tree:
        if key not in ("out", "models", "data", *EVALS):
            guess = nearest(key, ["out", "models", "data", *EVALS])
            told = f"nearest: {guess!r}" if guess else f"expected out, models, data, or an eval: {', '.join(EVALS)}"
            wrong((key,), f"[{key}]: no such table; {told}")
    models = _models(tree.get("models"), wrong)
    data = _data(tree.get("data", {}), wrong)
    out = Path(os.path.expanduser(tree.get("out") or file.with_suffix("")))
    asked = {name: tree[name] for name in EVALS if name in tree}
    if not asked:
        wrong((), f"nothing to do: add a table for an eval: {', '.join(f'[{name}]' for name in EVALS)}")
    jobs = []
    for name, options in asked.items():
        if isinstance(options, dict):
            jobs += _jobs(name, options, models, data, out, wrong)
        else:
            wrong((name,), f"{name}: expected a table [{name}]")
    if problems:
        raise ConfigError("\n".join(problems))
    return Sweep(file, out, jobs)


def _models(table: Any, wrong) -> dict[str, Model]:
    if not isinstance(table, dict) or not table:
        wrong(("models",), "[models]: expected names of models with their folders, such as DP2 = \"outputs/DP2\"")
        return {}
    found = {}
    for name, value in table.items():
        entry = {"path": value} if isinstance(value, str) else value
        good = isinstance(entry, dict) and isinstance(entry.get("path"), str) and set(entry) <= {"path", "step"}
        if not good or not isinstance(entry.get("step", 0), int) or not NAME.fullmatch(name):
            wrong(("models", name), f"[models] {name}: expected \"FOLDER\" or {{ path = \"FOLDER\", step = 500 }}, "
                  "and a name of letters, digits, '.', '_', '+' and '-'")  # fmt: skip
        else:
            found[name] = Model(name, os.path.expanduser(entry["path"]), entry.get("step"))
    return found


def _data(table: Any, wrong) -> dict[str, str]:
    if not isinstance(table, dict):
        wrong(("data",), '[data]: expected names of datasets, such as code = "data/code/validation"')
        return {}
    for name, value in table.items():
        if not isinstance(value, str) or not NAME.fullmatch(name):
            wrong(("data", name), f"[data] {name}: expected what --data takes, as text")
    return {name: os.path.expanduser(value) for name, value in table.items() if isinstance(value, str)}


def _jobs(eval_name: str, options: dict, models: dict[str, Model], data: dict[str, str], out: Path, wrong) -> list[Job]:
    """The jobs of one eval's table."""
    chosen = _chosen(eval_name, "models", options, list(models), wrong)
    sets = _chosen(eval_name, "data", options, list(data), wrong) if eval_name in ON_DATA else [""]
    if eval_name in ON_DATA and not sets:
        wrong((eval_name,), f"[{eval_name}]: reads datasets; name some in [data]")
    if eval_name not in ON_DATA and "data" in options:
        wrong((eval_name, "data"), f"[{eval_name}] data: this eval reads none")
    for key in options:
        if key in RESERVED[2:]:
            wrong((eval_name, key), f"[{eval_name}] {key}: the sweep sets it; steps stand in [models]")
    words = _words({key: value for key, value in options.items() if key not in RESERVED}, eval_name == "lm_harness")
    if reason := _refusal(eval_name, words, next(iter(data.values()), "")):
        wrong((eval_name,), f"[{eval_name}]: {reason}")
    found = []
    for model in chosen:
        for name in sets:
            label = "/".join([eval_name, model, *([name] if name else [])])
            folder = out / label
            of_data = ["--data", data[name]] if name else []
            step = models[model].step
            what = [models[model].path, *(["--step", str(step)] if step is not None else [])]
            if eval_name == "lm_harness" and step is not None:
                # The path as a word of its own: in --model_args a comma would end it, and a number be none.
                what = [models[model].path, "--model_args", f"step={step}"]
            command = [sys.executable, "-m", f"eval.{eval_name}", *what, *of_data,
                       OUT.get(eval_name, "--out"), str(folder), *words]  # fmt: skip
            found.append(Job(label, eval_name, models[model], name, folder, command))
    return found


def _chosen(eval_name: str, key: str, options: dict, known: list[str], wrong) -> list[str]:
    """The models or datasets that an eval's table names; all of them if it names none."""
    asked = options.get(key, known)
    if not isinstance(asked, list) or any(not isinstance(name, str) for name in asked):
        wrong((eval_name, key), f"[{eval_name}] {key}: expected a list of names")
        return []
    for name in asked:
        if name not in known:
            guess = nearest(name, known)
            told = f"nearest: {guess!r}" if guess else f"there are: {', '.join(known) or 'none'}"
            wrong((eval_name, key), f"[{eval_name}] {key}: {name!r} is not in [{key}]; {told}")
    return [name for name in asked if name in known]


def _words(options: dict[str, Any], underscores: bool) -> list[str]:
    """Keys and values as options of a command line: true is a flag, a list several values."""
    words = []
    for key, value in options.items():
        flag = f"--{key if underscores else key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not False:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


def _refusal(eval_name: str, words: list[str], data: str) -> str:
    """What an eval's own command line says against its options, or ""."""
    if eval_name == "lm_harness":
        # lm-eval need not be installed where a sweep is planned.
        return "" if "--tasks" in words else 'expected tasks = "lambada_openai,..."'
    parse = importlib.import_module(f"eval.{eval_name}").parse
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse(["model", *(["--data", data or "x"] if eval_name in ON_DATA else []), *words])
    except SystemExit:
        lines = said.getvalue().strip().splitlines()
        return lines[-1].partition("error: ")[2] if lines else "an option is wrong"
    except ConfigError as error:
        return str(error).splitlines()[0]
    return ""

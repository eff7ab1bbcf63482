"""From a sweep's TOML to its jobs: one for each (eval, model, dataset), with the command that does it.

    sweep = read_sweep(Path("eval/example_sweep.toml"))
    for job in sweep.jobs: print(job.name, job.command)

A grid of training runs (`launch.grid`) evaluates its runs in the same way, by the same tables. A job is done when the
results in its folder say that they were made by this command, of these weights: a newer checkpoint, or another option,
makes it due again.
"""

import importlib
import os
import pkgutil
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torchtitan_deltaproduct import evaluation
from torchtitan_deltaproduct.config.locate import read_toml
from torchtitan_deltaproduct.errors import CheckpointError, ConfigError, nearest
from torchtitan_deltaproduct.jobs import Job

from ..swept import Swept, checkpoint_of

SET_BY_SWEEP = ("out", "output_path", "step", "from", "model_args", "model")
NAME = re.compile(r"[\w.+-]+")


@cache
def evals() -> dict[str, Swept]:
    """Every evaluation that can be swept, by name: the modules of this package with a `SWEPT`."""
    names = [module.name for module in pkgutil.iter_modules(evaluation.__path__) if module.ispkg]
    modules = {name: importlib.import_module(f"{evaluation.__name__}.{name}") for name in names if name != "sweep"}
    return {name: module.SWEPT for name, module in modules.items() if hasattr(module, "SWEPT")}


@dataclass(frozen=True)
class Model:
    """A model of the sweep: its name there, where it is, and the step asked for (None: the newest complete one)."""

    name: str
    path: str
    step: int | None = None

    @property
    def checkpoint(self) -> str:
        """What its weights are now: it may be training; CheckpointError if there are none (yet)."""
        return checkpoint_of(self.path, self.step)


@dataclass(frozen=True)
class SweepJob(Job):
    """One eval of one model, on one dataset or none."""

    name: str
    """`length_extrapolation/DP2/code`, also its folder below the sweep's."""
    eval: str
    model: Model
    data: str
    """Name of the dataset; empty for evals without."""
    folder: Path
    """For results and log.txt."""
    words: list[str]
    """Arguments of the eval's command."""

    @property
    def command(self) -> list[str]:
        """What to run."""
        return [sys.executable, "-m", f"eval.{self.eval}", *self.words]

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def prepare(self) -> None:
        """Removes results of another command or other weights; the folder is this job's, whatever it read then."""
        (self.folder / f"{self.eval}.json").unlink(missing_ok=True)

    def state(self) -> str:
        if self.obstacle():
            return super().state()
        other = not self.is_done() and evals()[self.eval].made_by(self.folder)
        again = " again: its results are of another command or of other weights" if other else ""
        return f"{super().state()}{again} ({self.model.checkpoint})"

    def obstacle(self) -> str:
        """Why it cannot run now, or ""."""
        try:
            _ = self.model.checkpoint
        except CheckpointError as error:
            return str(error).splitlines()[0]
        return ""

    def is_done(self) -> bool:
        """Whether its results are there, by this command and of these weights."""
        if self.obstacle():
            return False
        made_by = evals()[self.eval].made_by(self.folder)
        return made_by == {"arguments": self.words, "checkpoints": [self.model.checkpoint]}


@dataclass(frozen=True)
class Sweep:
    """What a TOML asks for: all jobs, in its order, and the folder `out` of everything they make."""

    file: Path
    out: Path
    jobs: list[SweepJob]


def read_sweep(file: Path) -> Sweep:
    """Reads and checks a sweep's TOML, such as eval/example_sweep.toml; ConfigError: all that is wrong with it."""
    tree, lines = read_toml(file, "a sweep, such as eval/example_sweep.toml")
    reader = TableReader(file, lines, ("out", "models", "data"))
    if not isinstance(tree.get("out", ""), str):
        reader.wrong(("out",), "out: expected the path of a folder")
        reader.refuse()
    out = Path(os.path.expanduser(tree.get("out") or file.with_suffix("")))
    jobs = reader.jobs(tree, reader.models(tree.get("models")), out)
    if not any(name in tree for name in evals()):
        reader.wrong((), f"nothing to do: add a table for an eval: {', '.join(f'[{name}]' for name in evals())}")
    reader.refuse()
    return Sweep(file, out, jobs)


class TableReader:
    """Reads the tables that say what is evaluated, and notes all that is wrong with them.

    `lines` are those of the keys of the TOML, `keys` what may stand in it beside the tables of evals.
    """

    def __init__(self, file: Path, lines: dict[tuple[str, ...], int], keys: tuple[str, ...]):
        self.file, self.lines, self.keys, self.problems = file, lines, keys, []

    def wrong(self, where: tuple[str, ...], what: str) -> None:
        self.problems.append(f"{self.file}:{self.lines.get(where, 1)}: {what}")

    def refuse(self) -> None:
        """Raises ConfigError if anything was wrong."""
        if self.problems:
            raise ConfigError("\n".join(self.problems))

    def jobs(self, tree: dict[str, Any], models: dict[str, Model], out: Path) -> list[SweepJob]:
        """The jobs of all evals, for models by their names, with results below `out`."""
        for key in tree:
            if key not in (*self.keys, *evals()):
                guess = nearest(key, [*self.keys, *evals()])
                expected = f"expected {', '.join(self.keys)}, or an eval: {', '.join(evals())}"
                self.wrong((key,), f"[{key}]: no such table; {f'nearest: {guess!r}' if guess else expected}")
        data, jobs = self.data(tree.get("data", {})), []
        for name in (name for name in tree if name in evals()):
            if isinstance(tree[name], dict):
                jobs += self.jobs_of(name, tree[name], models, data, out)
            else:
                self.wrong((name,), f"{name}: expected a table [{name}]")
        return jobs

    def models(self, table: Any) -> dict[str, Model]:
        if not isinstance(table, dict) or not table:
            example = 'such as DP2 = "outputs/DP2"'
            self.wrong(("models",), f"[models]: expected names of models with their folders, {example}")
            return {}
        models = {}
        for name, value in table.items():
            entry = {"path": value} if isinstance(value, str) else value
            good = isinstance(entry, dict) and isinstance(entry.get("path"), str) and set(entry) <= {"path", "step"}
            if not good or not isinstance(entry.get("step", 0), int) or not NAME.fullmatch(name):
                names = "a name of letters, digits, '.', '_', '+' and '-'"
                forms = '"FOLDER" or { path = "FOLDER", step = 500 }'
                self.wrong(("models", name), f"[models] {name}: expected {forms}, and {names}")
            else:
                models[name] = Model(name, os.path.expanduser(entry["path"]), entry.get("step"))
        return models

    def data(self, table: Any) -> dict[str, str]:
        if not isinstance(table, dict):
            self.wrong(("data",), '[data]: expected names of datasets, such as code = "data/code/validation"')
            return {}
        for name, value in table.items():
            if not isinstance(value, str) or not NAME.fullmatch(name):
                self.wrong(("data", name), f"[data] {name}: expected what --data takes, as text")
        return {name: os.path.expanduser(value) for name, value in table.items() if isinstance(value, str)}

    def jobs_of(
        self, name: str, options: dict, models: dict[str, Model], data: dict[str, str], out: Path
    ) -> list[SweepJob]:
        """The jobs of one eval's table."""
        swept = evals()[name]
        chosen = self.chosen(name, "models", options, list(models))
        sets = self.chosen(name, "data", options, list(data)) if swept.reads_data else [""]
        if swept.reads_data and not sets:
            self.wrong((name,), f"[{name}]: reads datasets; name some in [data]")
        if not swept.reads_data and "data" in options:
            self.wrong((name, "data"), f"[{name}] data: this eval reads none")
        for key in options:
            if key in SET_BY_SWEEP:
                self.wrong((name, key), f"[{name}] {key}: the sweep sets it; steps stand in [models]")
        own = {key: value for key, value in options.items() if key not in (*SET_BY_SWEEP, "models", "data")}
        if reason := swept.refusal(own, next(iter(data.values()), "")):
            self.wrong((name,), f"[{name}]: {reason}")
        jobs = []
        for model in chosen:
            for dataset in sets:
                label = "/".join([name, model, *([dataset] if dataset else [])])
                words = swept.words(models[model].path, models[model].step, data.get(dataset, ""), out / label, own)
                jobs.append(SweepJob(label, name, models[model], dataset, out / label, words))
        return jobs

    def chosen(self, eval_name: str, key: str, options: dict, known: list[str]) -> list[str]:
        """The models or datasets that an eval's table names; all of them if it names none."""
        asked = options.get(key, known)
        if not isinstance(asked, list) or any(not isinstance(name, str) for name in asked):
            self.wrong((eval_name, key), f"[{eval_name}] {key}: expected a list of names")
            return []
        for name in asked:
            if name not in known:
                guess = nearest(name, known)
                hint = f"nearest: {guess!r}" if guess else f"there are: {', '.join(known) or 'none'}"
                self.wrong((eval_name, key), f"[{eval_name}] {key}: {name!r} is not in [{key}]; {hint}")
        return [name for name in asked if name in known]

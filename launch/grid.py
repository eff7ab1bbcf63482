"""Many training runs from one TOML: settings x seeds. Trains and evaluates what is missing, then prints one table.

    python -m launch.grid train_configs/claims/S3.toml --dry-run           the runs, and what is done already
    python -m launch.grid train_configs/claims/S3.toml --seeds 1 2 3       one run a GPU, or a core, at a time
    python -m launch.grid GRID.toml --jobs 16                              on 8 GPUs two runs each
    python -m launch.grid GRID.toml --slurm --gpus 1 --time 2:00:00        as an array, a run a task
    python -m launch.grid GRID.toml --training.steps 50                    further arguments go to all runs

    base = "../state_tracking/laptop_S3.toml"   # a training TOML, seen from here
    out = "outputs/state_tracking"              # the runs are OUT/SETTING/seed-N
    seeds = [1, 2, 3]                           # of the data and of the weights
    device = "cpu"                              # cpu, auto
    ranks = 1                                   # of each run; with more, torchrun and so many GPUs

    [vary]                                      # the settings are the product of these lists; named ones, in their
    "model.num_householder" = [1, 2]            # place or in front of them, are tables [settings.NAME], which may
                                                # have a `base` and `seeds` of their own

    [overrides]                                 # of all runs
    "training.steps" = 500

    [state_tracking]                            # evaluations of each run and their options, as in a sweep
    words = 1024

The same command again goes on where it was: runs continue from their newest checkpoint, and a run is finished when its
own folder says so. Failed runs are named at the end. OUT/results.* keep what was collected there of other seeds under
the same settings. Exit code 0: all is done, evaluations too; 1: something is not.
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from torchtitan_deltaproduct.arguments import Parser
from torchtitan_deltaproduct.arguments import path as path_of
from torchtitan_deltaproduct.checkpoint import latest_complete
from torchtitan_deltaproduct.config import Environment, JobConfig, load_config
from torchtitan_deltaproduct.config.compare import UNKNOWN_TO_ONE, compare_configs, refuse_breaking, same_rates
from torchtitan_deltaproduct.config.load import parse_overrides
from torchtitan_deltaproduct.config.locate import read_toml
from torchtitan_deltaproduct.config.problems import raise_if_any
from torchtitan_deltaproduct.config.schema import schema
from torchtitan_deltaproduct.config.snapshots import read_snapshot, snapshot
from torchtitan_deltaproduct.config.values import flatten, show
from torchtitan_deltaproduct.errors import ConfigError, exit_on_user_error
from torchtitan_deltaproduct.evaluation.options import make_folder
from torchtitan_deltaproduct.evaluation.sweep.collect import metrics_of, pictures
from torchtitan_deltaproduct.evaluation.sweep.plan import NAME, Model, SweepJob, TableReader
from torchtitan_deltaproduct.history import ends, of_a_step, read_jsonl
from torchtitan_deltaproduct.jobs import (
    Job,
    add_job_options,
    chosen,
    listed_or_submitted,
    places_for,
    refuse_unread,
    report_failures,
    run_jobs,
    without_slurm,
)

from .node import TRAIN
from .sbatch import submit_jobs
from .summary import Result, Summary

KEYS = ("base", "out", "seeds", "device", "ranks", "overrides", "vary", "settings", "data", "claim", "expect")
LEARNED = ("training.", "optimizer.", "lr_scheduler.", "debug.")
"""Options that decide what a run learned, beside those that make it another run."""
FINAL = ("loss", "validation loss", "validation bits per byte", "validation token accuracy")
"""The numbers of metrics.jsonl that are results, of the last step; in tables, where there are no evaluations."""


@dataclass(frozen=True)
class Run(Job):
    """One training run of a grid.

    Attributes:
        setting: what its seeds have in common.
        seed: of the data and of the weights.
        words: `--section.key value` words for the trainer.
        config: what they come to.
        ranks: of the run.
        recorded: its results, where they are known: there is nothing to run.
    """

    setting: str
    seed: int
    words: list[str]
    config: JobConfig
    ranks: int
    recorded: Result | None = None

    @property
    def name(self) -> str:
        return f"{self.setting}/seed-{self.seed}"

    @property
    def command(self) -> list[str]:
        torchrun = ["-m", "launch.torchrun", "--standalone", f"--nproc-per-node={self.ranks}"] if self.ranks > 1 else []
        return [sys.executable, *torchrun, "-m", TRAIN, *self.words]

    @property
    def folder(self) -> Path:
        return Path(self.config.job.dump_folder)

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    @property
    def recipe(self) -> str:
        """Twelve hex digits of all that decides what it learns: the options that are not at their defaults, but for
        harmless ones. Another version's new option leaves it as it is."""
        values = {
            key: value
            for key, value in flatten(asdict(self.config)).items()
            if key in schema() and schema()[key].record.resume.kind != "harmless" and value != schema()[key].default
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def of_seed(self, seed: int) -> "Run":
        """The same of another seed, but for its words and its folder."""
        data, debug = replace(self.config.data, seed=seed), replace(self.config.debug, seed=seed)
        return replace(self, seed=seed, config=replace(self.config, data=data, debug=debug))

    def is_done(self) -> bool:
        """Whether its folder holds the last step, validated if it is to be, or its results are recorded.

        Raises:
            ConfigError: the folder holds a run with other settings.
        """
        if self.recorded is not None:
            return True
        newest = latest_complete(self.folder / self.config.checkpoint.folder)
        if newest is None:
            return False
        saved = read_snapshot(newest.path / "config.json") or {}
        comparison = compare_configs(saved, snapshot(self.config, {"world_size": self.ranks}))
        refuse_breaking(comparison, newest.path, self.config.provenance)
        steps = self.config.training.steps
        extended = newest.step <= steps and same_rates(saved, self.config, newest.step)
        # "auto" was replaced by what it came to when the run began; a new version's option had no effect before it.
        changed = [
            change
            for change in comparison.notable
            if change.key.startswith(LEARNED)
            and change.new != "auto"
            and change.why != UNKNOWN_TO_ONE
            and not (change.key == "training.steps" and extended)
        ]
        if changed:
            raise ConfigError(
                f"{self.folder} was trained to step {newest.step:,} with other settings: "
                f"{'; '.join(map(str, changed))}\ndelete it to train it anew, or choose another folder with --out"
            )
        # A validation that was broken off is made up for, unless weights alone were saved.
        owed = self.config.validation.enable and not self.config.checkpoint.last_save_model_only
        return newest.step >= steps and ("validation_loss" in self.final or not owed)

    def progress(self) -> tuple[int, int, str]:
        newest = {name: value for record in self.records for name, value in record.items() if value is not None}
        note = f"loss {newest['loss']:.4f}" if newest.get("loss") is not None else "starting"
        if "validation_token_accuracy" in newest:
            note += f", validation accuracy {newest['validation_token_accuracy']:.1%}"
        return newest.get("step", 0), self.config.training.steps, note

    @property
    def records(self) -> list[dict[str, float | None]]:
        """The newest of metrics.jsonl."""
        return list(filter(of_a_step, ends(self.folder / "metrics.jsonl", head=0)))

    @property
    def final(self) -> dict[str, float | None]:
        """The numbers of its last step. A validation that a signal broke off is not among them: its restart makes up
        for it."""
        last = [record for record in self.records if record["step"] == self.config.training.steps]
        return {name: value for record in last for name, value in record.items()}


@dataclass(frozen=True)
class Grid:
    """What a grid's TOML and the command line come to.

    Attributes:
        file: the TOML.
        tree: its content.
        out: folder of everything it makes.
        runs: seed by seed.
        evaluations: of all runs, in the order of the file.
        as_written: nothing on the command line changed what is run.
    """

    file: Path
    tree: dict[str, Any]
    out: Path
    runs: list[Run]
    evaluations: list[SweepJob]
    as_written: bool

    def evaluations_after(self, job: Job) -> list[SweepJob]:
        """Of a run whose results are not recorded."""
        if not isinstance(job, Run) or job.recorded:
            return []
        return [evaluation for evaluation in self.evaluations if evaluation.model.name == job.name]


def read_grid(
    file: Path, seeds: list[int], out: str, overrides: list[str], environment: Environment | None = None
) -> Grid:
    """Reads and checks a grid's TOML.

    Args:
        file: the TOML, as the module docstring shows it.
        seeds: instead of the file's, unless empty.
        out: instead of the file's, unless empty.
        overrides: `--section.key value` words for all runs.
        environment: that the settings are checked against; None: this machine.

    Raises:
        ConfigError: what is wrong with it, or with the settings of a run.
    """
    # What is wrong with the command line is not to be told of each setting of the file.
    raise_if_any(parse_overrides(overrides)[1])
    tree, lines = read_toml(file, "a grid, such as train_configs/claims/S3.toml")
    reader = TableReader(file, lines, KEYS)
    for key, kind, form in FORMS:
        if key in tree and (type(tree[key]) is not kind or (key == "seeds" and not are_seeds(tree[key]))):
            reader.wrong((key,), f"{key}: expected {form}")
    reader.refuse()
    if tree.get("ranks", 1) < 1:
        reader.wrong(("ranks",), f"ranks = {tree['ranks']}: must be at least 1")
    if tree.get("device", "auto") not in ("auto", "cpu"):
        reader.wrong(("device",), f'device = {show(tree["device"])}: expected "auto" or "cpu"')
    reader.refuse()
    ranks = tree.get("ranks", 1)
    folder = Path(os.path.expanduser(out or tree.get("out") or f"outputs/{file.stem}"))
    settings = settings_of(tree, reader)
    reader.refuse()
    runs = []
    shared = tree.get("seeds", [1])
    of_setting = {name: dict.fromkeys(seeds or own or shared) for name, (_, own, _) in settings.items()}
    for seed in dict.fromkeys(itertools.chain.from_iterable(of_setting.values())):
        for setting, (base, _, values) in settings.items():
            if seed not in of_setting[setting]:
                continue
            words = [
                "--job.config_file",
                str(file.parent / base),
                "--job.dump_folder",
                f"{folder}/{setting}/seed-{seed}",
            ]
            words += ["--data.seed", str(seed), "--debug.seed", str(seed)]
            for key, value in values.items():
                # A date, which no option takes, is a text that none takes either.
                words += [f"--{key}", value if isinstance(value, str) else json.dumps(value, default=str)]
            try:
                config = load_config([*words, *overrides], environment or Environment(ranks))
                runs.append(Run(setting, seed, [*words, *overrides], config, ranks))
            except ConfigError as error:
                raise ConfigError(f"{file}, setting {setting}: {error}") from None
    models = {run.name: Model(run.name, str(run.folder)) for run in runs}
    evaluations = reader.jobs(tree, models, folder / "eval")
    reader.refuse()
    return Grid(file, tree, folder, runs, evaluations, not (seeds or out or overrides))


SEEDS = "a list of whole numbers, one at least"
FORMS = (
    ("base", str, "the path of a training TOML"), ("out", str, "the path of a folder"),
    ("seeds", list, SEEDS), ("ranks", int, "a whole number"),
    ("overrides", dict, 'a table of options, "section.key" = value'),
    ("vary", dict, 'a table of lists, "section.key" = [value, ...]'), ("settings", dict, "tables [settings.NAME]"),
)  # fmt: skip
"""Keys of a grid, their types, and how to say so."""


def are_seeds(values: Any) -> bool:
    """Whether a value is a list of whole numbers, one at least."""
    return isinstance(values, list) and bool(values) and all(type(value) is int for value in values)


def settings_of(tree: dict[str, Any], reader: TableReader) -> dict[str, tuple[str, list[int], dict[str, Any]]]:
    """The settings by name: the TOML that each starts from, seeds of its own, and what it changes there."""
    named, vary = tree.get("settings") or {"": {}}, flatten(tree.get("vary", {}))
    for key, values in vary.items():
        if not isinstance(values, list) or not values:
            reader.wrong(("vary",), f'[vary] "{key}": expected a list of values')
            return {}
    settings = {}
    for name, table in named.items():
        if not isinstance(table, dict) or not isinstance(table.get("base", tree.get("base")), str):
            reader.wrong(("settings", name), f"[settings.{name}]: expected a table, and a base here or at the head")
            continue
        if "seeds" in table and not are_seeds(table["seeds"]):
            reader.wrong(("settings", name, "seeds"), f"[settings.{name}] seeds: expected {SEEDS}")
            continue
        own = flatten({key: value for key, value in table.items() if key not in ("base", "seeds")})
        for values in itertools.product(*vary.values()):
            varied = dict(zip(vary, values, strict=True))
            parts = [f"{key.rpartition('.')[2]}-{value}" for key, value in varied.items()]
            label = "_".join([*([name] if name else []), *parts]) or Path(tree["base"]).stem
            if not NAME.fullmatch(label):
                reader.wrong(
                    ("settings", name), f"{label!r}: expected a name of letters, digits, '.', '_', '+' and '-'"
                )
            values = flatten(tree.get("overrides", {})) | own | varied
            settings[label] = (table.get("base", tree.get("base")), table.get("seeds", []), values)
    return settings


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("launch.grid", __doc__, allow_abbrev=False)
    parser.add_argument("file", type=path_of, metavar="GRID.toml", help="the runs; shown at the head of launch/grid.py")
    add_grid_options(parser)
    options, overrides = parser.parse_with_overrides(arguments)
    refuse_unread(parser, options)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    again = without_slurm("launch.grid", sys.argv[1:] if arguments is None else arguments)
    return run_grid(read_grid(Path(options.file), options.seeds, options.out, overrides), options, console, again)


def add_grid_options(parser: argparse.ArgumentParser) -> None:
    """Adds --seeds, --out and those of `jobs.add_job_options`."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="instead of the TOML's")
    parser.add_argument("--out", type=path_of, default="", help="folder of the runs and results, instead of the TOML's")
    add_job_options(parser, jobs=0, jobs_default="one a GPU, or one a core without any")


def run_grid(grid: Grid, options: argparse.Namespace, console: Console, again: str) -> int:
    """Does what the options of `add_grid_options` ask for; returns the exit code.

    Args:
        grid: to be run.
        options: of the command line.
        console: for everything it prints.
        again: the command that goes on with it when an array is done.
    """
    runs = chosen(grid.runs, options.only)
    jobs = [job for run in runs for job in (run, *grid.evaluations_after(run))]
    if not options.dry_run:
        make_folder(grid.out)
    array = {"folder": grid.out / "slurm", "name": grid.file.stem, "submit": submit_jobs, "again": again}
    commands = {run.name: run.command for run in runs}
    if listed_or_submitted(jobs if options.dry_run else runs, commands, options, console, **array):
        return 0
    failed: dict[str, str] = {}
    if not options.collect:
        places = places_for(options.jobs, grid.tree.get("device", "auto"), len(runs), grid.tree.get("ranks", 1))
        console.print(f"{grid.out}: training and evaluating, at most {len(places)} at a time")
        failed = run_jobs(runs, places, console, grid.evaluations_after)
    summary = beside_other_seeds(grid, summarise(grid))
    if not summary.results and (grid.out / "results.jsonl").exists():
        console.print(
            f"no run is finished under these settings: results.* in {grid.out}, of other ones, are left as they are",
            soft_wrap=True,
        )
        report_failures(failed, console)
        return 1
    summary.write(grid.out)
    console.print(summary.without(FINAL if grid.evaluations else ()).table())
    pictures(grid.out / "eval", [job for job in grid.evaluations if job.is_done()], console)
    console.print(f"written: {grid.out}/results.jsonl, results.csv, results.md", soft_wrap=True)
    report_failures(failed, console)
    return 0 if all(job.is_done() for job in jobs) else 1


def summarise(grid: Grid) -> Summary:
    """What the finished runs came to: what is recorded, or the numbers of the last step and of evaluations."""
    results, left = [], 0
    for run in filter(Run.is_done, grid.runs):
        if run.recorded:
            results.append(run.recorded)
            continue
        final = run.final
        metrics = {name: final[key] for name in FINAL if (key := name.replace(" ", "_")) in final}
        for job in grid.evaluations_after(run):
            if job.is_done():
                metrics |= {" ".join(filter(None, (name, job.data))): value for name, value in metrics_of(job).items()}
            else:
                left += 1
        results.append(Result(run.setting, run.seed, metrics, run.recipe))
    return Summary(results, len(grid.runs), left)


def beside_other_seeds(grid: Grid, summary: Summary) -> Summary:
    """The same with the results of other seeds that results.jsonl holds of the grid's settings as they are."""
    planned, run_of = {(run.setting, run.seed) for run in grid.runs}, {run.setting: run for run in grid.runs}
    names = {field.name for field in fields(Result)}
    before = [Result(**record) for record in read_jsonl(grid.out / "results.jsonl") if record.keys() == names]
    others = [one for one in before if one.setting in run_of and (one.setting, one.seed) not in planned]
    others = [one for one in others if one.recipe == run_of[one.setting].of_seed(one.seed).recipe]
    return replace(summary, results=others + summary.results, planned=len(others) + summary.planned)


if __name__ == "__main__":
    exit_on_user_error(main)

"""The demonstration: n_h = 2 with eigenvalues in [-1, 1] follows S3; n_h = 1, or the range [0, 1], does not.

    python -m launch.state_tracking                        the four settings, seed 1: at most 12 minutes on two cores
    python -m launch.state_tracking --seeds 1 2 3          the share of seeds that solve it
    python -m launch.state_tracking --training.steps 500   further arguments go to the trainer

Trains on the CPU, as many runs at a time as there are cores, each with one thread; finished runs are reused and
interrupted ones go on. Then tests at four times the training length. Exit code 0: the claim was shown; 1: it was not;
2: something else is wrong.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from torchtitan_deltaproduct.checkpoint import latest_complete
from torchtitan_deltaproduct.config import JobConfig, load_config
from torchtitan_deltaproduct.config.compare import compare_configs, refuse_breaking
from torchtitan_deltaproduct.config.snapshots import read_snapshot, snapshot
from torchtitan_deltaproduct.errors import ConfigError, UserError, exit_on_user_error
from torchtitan_deltaproduct.history import parse_line

CONFIGS = "train_configs/state_tracking/laptop_S3_*.toml"
CLEAR_FAILURE = 0.7
"""A setting that should fail does so clearly below this token accuracy at the tested length; guessing gives 1/6."""
SECONDS_BETWEEN_LINES = 15.0


@dataclass
class Run:
    """One training run of the demonstration."""

    name: str
    arguments: list[str]
    config: JobConfig
    process: subprocess.Popen | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config.job.dump_folder)

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    def where(self) -> tuple[int, str]:
        """The newest step of metrics.jsonl, and its loss and validation accuracy in words."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return 0, "starting"
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 65536))
            lines = stream.read().splitlines()
        newest: dict = {}
        # The first line may be cut by the seek, and the last by the writer.
        for record in filter(None, map(parse_line, lines)):
            newest |= {name: value for name, value in record.items() if isinstance(value, int | float)}
        note = "starting" if newest.get("loss") is None else f"loss {newest['loss']:.4f}"
        if "validation_token_accuracy" in newest:
            note += f", validation accuracy {newest['validation_token_accuracy']:.1%}"
        return newest.get("step", 0), note


def main(arguments: list[str] | None = None) -> int:
    options, overrides = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    runs = plan(options.configs, options.seeds, Path(options.out), overrides)
    jobs = min(options.jobs or cores(), len(runs))
    todo = [run for run in runs if not is_finished(run)]
    console.print(
        f"{len(runs)} runs in {options.out}: {len(runs) - len(todo)} finished already, {len(todo)} to train, "
        f"{jobs} at a time"
    )
    start = time.monotonic()
    train(todo, jobs, console)
    if todo:
        console.print(f"trained in {time.monotonic() - start:.0f} s")
    return conclude(runs, options, console)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m launch.state_tracking", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[1], help="of the words and of the weights (default: 1)")
    add("--out", default="outputs/state_tracking", help="folder of the runs and the results (default: %(default)s)")
    add("--jobs", type=int, default=0, help="runs at a time (default: as many as there are cores)")
    add("--words", type=int, default=1024, help="words tested a run (default: %(default)s)")
    add("--configs", nargs="+", metavar="TOML", help=f"S3 settings to run (default: {CONFIGS})")
    options, overrides = parser.parse_known_args(arguments)
    if options.jobs < 0 or options.words < 1:
        raise ConfigError(f"--jobs {options.jobs} --words {options.words}: must be at least 1")
    options.configs = [Path(path) for path in options.configs or sorted(Path().glob(CONFIGS))]
    if not options.configs:
        raise UserError(f"{CONFIGS} are not here: run this from the top folder of the repository")
    return options, overrides


def plan(configs: list[Path], seeds: list[int], out: Path, overrides: list[str]) -> list[Run]:
    """The runs, seed by seed, with checked configs.

    Raises:
        ConfigError: a config that cannot be run, or that is not about S3.
    """
    runs = []
    for seed in dict.fromkeys(seeds):
        for path in configs:
            folder = out / path.stem / f"seed-{seed}"
            arguments = ["--job.config_file", str(path), "--job.dump_folder", str(folder)]
            arguments += ["--data.seed", str(seed), "--debug.seed", str(seed)]
            # What `auto` means on a CPU; written out, it also is what the run records of itself.
            arguments += ["--training.mixed_precision_param", "float32", *overrides]
            config = load_config(arguments)
            if (config.data.kind, config.data.group) != ("group_word", "S3"):
                raise ConfigError(f"{path} is not on group words over S3, which this demonstration is about")
            runs.append(Run(f"{path.stem} seed {seed}", arguments, config))
    return runs


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_finished(run: Run) -> bool:
    """Whether the run's folder holds its last step.

    Raises:
        ConfigError: the folder holds a run with other settings.
    """
    newest = latest_complete(run.folder / run.config.checkpoint.folder)
    if newest is None:
        return False
    saved = read_snapshot(newest.path / "config.json") or {}
    comparison = compare_configs(saved, snapshot(run.config, {"world_size": 1}))
    refuse_breaking(comparison, newest.path, run.config.provenance)
    if newest.step < run.config.training.steps:
        return False
    learned = ("training.", "optimizer.", "lr_scheduler.", "debug.")
    changed = [str(change) for change in comparison.notable if change.key.startswith(learned)]
    if changed:
        raise ConfigError(
            f"{run.folder} was trained to its end with other settings: {'; '.join(changed)}\n"
            "delete it to train it anew, or choose another folder with --out"
        )
    return True


def train(runs: list[Run], jobs: int, console: Console) -> None:
    """Trains the runs, `jobs` at a time; on a failure or an interrupt the others are stopped (and go on next time).

    Raises:
        UserError: a run failed; says what its log said last.
    """
    waiting, active = deque(runs), []
    try:
        with Display(runs, console) as display:
            while waiting or active:
                while waiting and len(active) < jobs:
                    active.append(start(waiting.popleft()))
                time.sleep(0.5)
                display.update(active)
                for run in [run for run in active if run.process.poll() is not None]:
                    active.remove(run)
                    if run.process.returncode:
                        tail = "\n".join(run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
                        raise UserError(f"{run.name} ended with code {run.process.returncode}; {run.log} ends:\n{tail}")
                    display.finish(run)
    finally:
        for run in active:
            run.process.terminate()
        for run in active:
            run.process.wait()


def start(run: Run) -> Run:
    """Starts the trainer on one core of the CPU."""
    run.folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torchtitan_deltaproduct.train", *run.arguments]
    with run.log.open("a", encoding="utf-8") as log:
        run.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return run


class Display:
    """Progress of the runs: bars on a terminal, a line a run every 15 seconds elsewhere."""

    def __init__(self, runs: list[Run], console: Console):
        self.console, self.last_report = console, time.monotonic()
        self.bars = None
        if console.is_terminal and runs:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bars = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
            self.tasks = {
                run.name: self.bars.add_task(run.name, total=run.config.training.steps, start=False, note="waiting")
                for run in runs
            }

    def __enter__(self) -> "Display":
        if self.bars:
            self.bars.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bars:
            self.bars.stop()

    def update(self, active: list[Run]) -> None:
        """Shows where the active runs are."""
        if not self.bars and time.monotonic() - self.last_report < SECONDS_BETWEEN_LINES:
            return
        self.last_report = time.monotonic()
        for run in active:
            (step, note), total = run.where(), run.config.training.steps
            if self.bars:
                self.bars.start_task(self.tasks[run.name])
                self.bars.update(self.tasks[run.name], completed=step, note=note)
            else:
                self.console.print(f"{run.name}: step {step} of {total}, {note}")

    def finish(self, run: Run) -> None:
        if self.bars:
            self.bars.update(self.tasks[run.name], completed=run.config.training.steps, note="done")
            self.bars.stop_task(self.tasks[run.name])
        else:
            self.console.print(f"{run.name}: done")


def conclude(runs: list[Run], options: argparse.Namespace, console: Console) -> int:
    """Tests the runs, prints the tables and the verdict; returns the exit code."""
    # Only now: torch would take its time before the first line, and memory while the runs train.
    from torchtitan_deltaproduct.checkpoint.load import load_model
    from torchtitan_deltaproduct.evaluation.state_tracking import evaluate, report
    from torchtitan_deltaproduct.evaluation.state_tracking.problems import problem_of
    from torchtitan_deltaproduct.evaluation.state_tracking.results import Criterion, by_setting

    results = []
    for run in runs:
        loaded = load_model(run.folder, step=run.config.training.steps)
        results.append(evaluate(loaded, problem_of(loaded.config), options.words, console))
    criterion, settings = Criterion(), by_setting(results)
    report(settings, criterion, Path(options.out) / "state_tracking", console)
    console.print(four_cells(settings, criterion))
    shown, lines = verdict(settings, criterion)
    for line in lines:
        console.print(line)
    return 0 if shown else 1


def should_solve(setting) -> bool:
    """S3 needs two Householders a token and eigenvalues down to -1 (arXiv 2502.10297, theorem and figure on S3)."""
    settings = setting.runs[0].settings
    return settings["model.num_householder"] >= 2 and settings["model.allow_neg_eigval"]


def four_cells(settings: list, criterion) -> Table:
    """The table of the paper's README: n_h by eigenvalue range, solved or not."""
    ranges = ["[-1, 1]", "[0, 1]"]
    out = Table(title="S3 at 4x the training length", title_justify="left")
    out.add_column("n_h")
    for name in ranges:
        out.add_column(f"eigenvalues in {name}")
    for n in sorted({setting.runs[0].n_h for setting in settings}):
        cells = []
        for name in ranges:
            chosen = [s for s in settings if (s.runs[0].n_h, s.runs[0].range) == (n, name)]
            cells.append("\n".join(_cell(setting, criterion) for setting in chosen))
        out.add_row(str(n), *cells)
    return out


def _cell(setting, criterion) -> str:
    solved, seeds = sum(run.solved(criterion) for run in setting.runs), len(setting.runs)
    word = "[green]solved[/]" if solved == seeds else "[red]not solved[/]" if not solved else "sometimes"
    return f"{word}, {solved} of {seeds} seeds, {setting.mean('at_length'):.1%}"


def verdict(settings: list, criterion) -> tuple[bool, list[str]]:
    """Whether the claim was shown, and the lines that say why.

    Shown: more than half of the seeds solve each setting that should (training is bistable, and a seed that fails is
    named), and no seed of the others solves S3 or comes near, with both kinds among the settings.
    """
    lines, shown = [], True
    for setting in settings:
        for run in setting.runs:
            solved, accuracy = run.solved(criterion), run.at_length.value
            what = f"{setting.label}, seed {run.seeds[0]}: {accuracy:.1%} at {run.problem.length} tokens"
            if should_solve(setting) and not solved:
                lines.append(f"[red]should solve S3 but did not[/]: {what}, {run.at_training.value:.1%} at "
                             f"{run.problem.train_length}")  # fmt: skip
            elif not should_solve(setting) and (solved or accuracy >= CLEAR_FAILURE):
                lines.append(f"[red]should fail but did not clearly[/]: {what}")
                shown = False
        if should_solve(setting):
            shown &= 2 * sum(run.solved(criterion) for run in setting.runs) > len(setting.runs)
    if len({should_solve(setting) for setting in settings}) < 2:
        lines.append("nothing is shown without a setting that should solve S3 and one that should not")
        shown = False
    claim = "n_h = 2 with eigenvalues in [-1, 1] solves S3, and the other settings do not"
    lines.append(f"[bold green]shown[/]: {claim}" if shown else f"[bold red]not shown[/]: {claim}")
    return shown, lines


if __name__ == "__main__":
    # So that the runs are stopped too when the demonstration is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    exit_on_user_error(main)

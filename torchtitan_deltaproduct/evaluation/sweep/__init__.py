"""Every eval of every model on every dataset, from one TOML: runs what is missing, and collects what is there.

    python -m eval.sweep eval/example_sweep.toml --dry-run        the list, and what is done already
    python -m eval.sweep eval/example_sweep.toml                  one job after another
    python -m eval.sweep eval/example_sweep.toml --slurm --gpus 1 --time 2:00:00       as an array, a task a job
    python -m eval.sweep eval/example_sweep.toml --collect        results.csv, .jsonl, .md and pictures, nothing run

The TOML names models, datasets and evals (eval/example_sweep.toml). A job that failed or was interrupted goes on where
it was when the same command is given again. Exit code 0: all jobs are done; 1: some are not.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from torchtitan_deltaproduct.arguments import Parser, path
from torchtitan_deltaproduct.errors import ConfigError

from ..options import make_folder
from .collect import collect, markdown, pictures, write_results
from .plan import Sweep, SweepJob, read_sweep

TAIL = 8
"""Lines of a failed job's log that are shown."""


Submit = Callable[[list[list[str]], Sweep, argparse.Namespace], str]
"""Hands commands to SLURM as one array and returns its job id."""


def main(arguments: list[str] | None = None, submit: Submit | None = None) -> int:
    """Runs the command line; `submit` is what --slurm needs."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    sweep = read_sweep(Path(options.file))
    jobs = chosen(sweep, options.only)
    if options.dry_run:
        console.print(listing(jobs))
        for job in jobs:
            console.print(shlex.join(["python", *job.command[1:]]), soft_wrap=True, style="dim")
        return 0
    make_folder(sweep.out)
    if options.slurm and submit is None:
        raise ConfigError("--slurm: expected `python -m eval.sweep`, run from the repository root")
    if options.slurm:
        return hand_over(sweep, jobs, options, submit, console)
    if not options.collect:
        run(jobs, console)
    if options.only and not options.collect:
        return 0 if all(job.is_done() for job in jobs) else 1
    rows = collect(sweep)
    write_results(sweep, rows)
    console.print(markdown(sweep, rows), soft_wrap=True)
    if rows:
        pictures(sweep, rows, console)
    console.print(f"written: {sweep.out}/results.csv, results.jsonl, results.md", soft_wrap=True)
    return 0 if len(rows) == len(sweep.jobs) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("eval.sweep", __doc__)
    add = parser.add_argument
    add("file", type=path, metavar="SWEEP.toml", help="models, datasets and evals; see eval/example_sweep.toml")
    add("--dry-run", action="store_true", help="print the jobs and their commands, run nothing")
    add("--collect", action="store_true", help="collect what is there, run nothing")
    add("--only", nargs="+", default=[], metavar="JOB", help="only jobs of these names, or whose names begin so")
    add("--slurm", action="store_true", help="submit what is missing as a SLURM array")
    add("--site", type=path, metavar="FILE", help="site TOML of --slurm (see launch/site_example.toml)")
    add("--gpus", type=int, default=0, help="of each task of --slurm (default: %(default)s)")
    add("--time", default="", help="limit of each task of --slurm (default: the site's)")
    add("--max-parallel", type=int, default=0, metavar="N", help="tasks of --slurm at a time (default: no limit)")
    return parser.parse_args(arguments)


def chosen(sweep: Sweep, only: list[str]) -> list[SweepJob]:
    """The jobs named, or all; raises ConfigError for a name that is none."""
    for name in only:
        if not any(f"{job.name}/".startswith(f"{name}/") for job in sweep.jobs):
            raise ConfigError(f"--only {name}: no such job; there are: {', '.join(job.name for job in sweep.jobs)}")
    return [job for job in sweep.jobs if not only or any(f"{job.name}/".startswith(f"{name}/") for name in only)]


def listing(jobs: list[SweepJob]) -> Table:
    """A line a job: what it is, and whether it is done."""
    table = Table()
    for name in ("job", "weights", "state"):
        table.add_column(name)
    for job in jobs:
        obstacle = job.obstacle()
        state = f"not ready: {obstacle}" if obstacle else "done" if job.is_done() else "to run"
        table.add_row(job.name, "" if obstacle else job.model.checkpoint, state)
    return table


def run(jobs: list[SweepJob], console: Console) -> None:
    """Runs what is missing, one after another; a job that fails does not keep the others from running."""
    todo = [job for job in jobs if not job.is_done()]
    console.print(f"{len(jobs)} jobs, {len(jobs) - len(todo)} done already")
    for number, job in enumerate(todo, start=1):
        if obstacle := job.obstacle():
            console.print(f"{number}/{len(todo)} {job.name}: not ready: {obstacle}", soft_wrap=True)
            continue
        console.print(f"{number}/{len(todo)} {job.name} ...", soft_wrap=True)
        start = time.monotonic()
        code = execute(job)
        seconds = time.monotonic() - start
        if code == 0:
            console.print(f"{number}/{len(todo)} {job.name}: done in {seconds:.0f} s", soft_wrap=True)
        else:
            tail = (job.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
            console.print(f"{number}/{len(todo)} {job.name}: failed with exit code {code}; {job.folder}/log.txt ends:")
            console.print("\n".join(f"    {line}" for line in tail), soft_wrap=True)


def execute(job: SweepJob) -> int:
    """Runs one job's command, its output going to log.txt; ended together with this process."""
    job.folder.mkdir(parents=True, exist_ok=True)
    # Of another command or other weights; the folder is this job's, whatever it read then.
    (job.folder / f"{job.eval}.json").unlink(missing_ok=True)
    with (job.folder / "log.txt").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT)
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGTERM, previous)
            if process.poll() is None:
                process.terminate()
                process.wait()


def hand_over(sweep: Sweep, jobs: list[SweepJob], options: argparse.Namespace, submit: Submit, console: Console) -> int:
    """Gives what is missing to SLURM, a task a job."""
    todo = [job for job in jobs if not job.is_done() and not job.obstacle()]
    if not todo:
        console.print("nothing to submit: every job is done, or its model is not ready")
        return 0
    commands = [[sys.executable, "-m", "eval.sweep", str(sweep.file), "--only", job.name] for job in todo]
    array = submit(commands, sweep, options)
    # More tasks than the cluster takes at once are several arrays, `12,13`.
    first = array.partition(",")[0]
    console.print(f"job {array}: {len(todo)} tasks; tail -f {sweep.out}/slurm/{first}_0.out", soft_wrap=True)
    console.print(f"when they are done: python -m eval.sweep {sweep.file} --collect", soft_wrap=True)
    return 0

"""Every eval of every model on every dataset, from one TOML: runs what is missing, and collects what is there.

    python -m eval.sweep eval/example_sweep.toml --dry-run        the list, and what is done already
    python -m eval.sweep eval/example_sweep.toml --jobs 8         eight at a time, spread over the GPUs if there are any
    python -m eval.sweep eval/example_sweep.toml --slurm --gpus 1 --time 2:00:00       as an array, a task a job
    python -m eval.sweep eval/example_sweep.toml --collect        results.csv, .jsonl, .md and pictures, nothing run

The TOML names models, datasets and evals (eval/example_sweep.toml). A job that failed or was interrupted goes on where
it was when the same command is given again. Exit code 0: all jobs are done; 1: some are not.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from torchtitan_deltaproduct.arguments import Parser, path
from torchtitan_deltaproduct.jobs import (
    Submit,
    add_job_options,
    chosen,
    listed_or_submitted,
    places_for,
    refuse_unread,
    report_failures,
    run_jobs,
)

from ..options import make_folder
from .collect import collect, markdown, pictures, write_results
from .plan import read_sweep


def main(arguments: list[str] | None = None, submit: Submit | None = None) -> int:
    """Runs the command line; `submit` is what --slurm needs."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    sweep = read_sweep(Path(options.file))
    jobs = chosen(sweep.jobs, options.only)
    if not options.dry_run:
        make_folder(sweep.out)
    commands = {job.name: [sys.executable, "-m", "eval.sweep", str(sweep.file), "--only", job.name] for job in jobs}
    again = f"python -m eval.sweep {sweep.file} --collect"
    array = {"folder": sweep.out / "slurm", "name": sweep.file.stem, "submit": submit, "again": again}
    if listed_or_submitted(jobs, commands, options, console, **array):
        return 0
    if not options.collect:
        report_failures(run_jobs(jobs, places_for(options.jobs, "auto", len(jobs)), console), console)
    if options.only and not options.collect:
        return 0 if all(job.is_done() for job in jobs) else 1
    rows = collect(sweep)
    write_results(sweep, rows)
    console.print(markdown(sweep, rows), soft_wrap=True)
    pictures(sweep.out, [job for job, _ in rows], console)
    console.print(f"written: {sweep.out}/results.csv, results.jsonl, results.md", soft_wrap=True)
    return 0 if len(rows) == len(sweep.jobs) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("eval.sweep", __doc__)
    parser.add_argument("file", type=path, metavar="SWEEP.toml",
                        help="models, datasets and evals; see eval/example_sweep.toml")  # fmt: skip
    add_job_options(parser, jobs=1, jobs_default="1")
    options = parser.parse_args(arguments)
    refuse_unread(parser, options)
    return options

"""Runs the claims of this project, and keeps what came of them: results/NAME.json, a table and a picture each.

    python -m launch.reproduce --list             the claims, what they cost, and where they stand
    python -m launch.reproduce S3                 runs what is missing of it; --jobs, --slurm, ... as of launch.grid
    python -m launch.reproduce                    all that this machine has the GPUs for
    python -m launch.reproduce --check            makes page, pictures and numbers again from results/, runs nothing
    python -m launch.reproduce S3 --seeds 1       a part of it, or (--training.steps 50 --out try) a variant: not kept

A claim is a TOML in train_configs/claims/ (see `launch.claims`); docs/science.md shows all of them. The same command
goes on where it was; what is recorded is not run again. Exit code 0: as expected or measured, no differences; 1: not.
"""

import argparse
import os
import platform
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchtitan_deltaproduct.arguments import Parser
from torchtitan_deltaproduct.config.snapshots import versions
from torchtitan_deltaproduct.data.check import check_data
from torchtitan_deltaproduct.errors import ConfigError, exit_on_user_error
from torchtitan_deltaproduct.evaluation.files import read_results
from torchtitan_deltaproduct.evaluation.state_tracking.results import read_settings
from torchtitan_deltaproduct.evaluation.sweep.plan import SweepJob
from torchtitan_deltaproduct.files import read_text, write_atomically
from torchtitan_deltaproduct.jobs import refuse_unread, visible_gpus, without_slurm

from .claims import (
    PAGE,
    README,
    Claim,
    Losses,
    Results,
    draw,
    page,
    read_claim,
    read_claims,
    results_of,
    sentences,
    together,
    verdict,
    with_recorded,
    write_results,
)
from .grid import Run, add_grid_options, run_grid, summarise

PIXELS = 0.01
"""Mean difference, of 1, up to which two pictures are the same: elsewhere fonts are drawn a little differently."""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("launch.reproduce", __doc__, in_full=True, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a claim (default: all)")
    parser.add_argument("--list", action="store_true", help="list the claims")
    parser.add_argument("--check", action="store_true", help="compare page, pictures and README.md with results/")
    parser.add_argument("--write", action="store_true", help="write page and pictures from results/")
    add_grid_options(parser)
    options, overrides = parser.parse_with_overrides(arguments)
    given = [*parser.given(options), *overrides]
    alone = [name for name in ("--list", "--check", "--write") if name in given]
    if alone and len(given) > 1:
        others = " ".join(word for word in given if word != alone[0])
        raise ConfigError(f"{alone[0]} takes names of claims and no other option; found besides: {others}")
    refuse_unread(parser, options)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    claims = read_claims(options.names)
    if options.list:
        console.print(listing(claims))
        return 0
    if options.check:
        return check(claims, console)
    if options.write:
        write(claims, console)
        return 0
    if not options.names:
        claims = affordable(claims, options, console)
    if (options.out or options.only) and len(claims) > 1:
        raise ConfigError("--out and --only are of one claim; name it")
    words, codes = sys.argv[1:] if arguments is None else arguments, [0]
    for claim in claims:
        # With its name: a machine with too few GPUs leaves out a claim that is not named.
        again = without_slurm("launch.reproduce", words if options.names else [claim.name, *words])
        codes.append(reproduce(claim, options, overrides, console, again))
    return max(codes)


def listing(claims: list[Claim]) -> Table:
    table = Table()
    for name in ("claim", "what", "budget", "runs done", "verdict"):
        table.add_column(name, overflow="fold")
    for claim in claims:
        results = results_of(claim)
        done = f"{len(results.summary.results)} of {results.summary.planned}"
        table.add_row(claim.name, escape(claim.title), claim.budget, done, verdict(claim, results).word)
    return table


def affordable(claims: list[Claim], options: argparse.Namespace, console: Console) -> list[Claim]:
    """The claims that this machine, or each task of --slurm, has the GPUs for."""
    gpus = options.gpus if options.slurm else len(visible_gpus())
    place, way = ("a task has", "--gpus N") if options.slurm else ("here are", "--slurm --gpus N")
    for claim in claims:
        if claim.gpus > gpus:
            console.print(f"{claim.name}: left out, needs {claim.gpus} GPUs and {place} {gpus}; {way}, or name it")
    return [claim for claim in claims if claim.gpus <= gpus]


def reproduce(claim: Claim, options: argparse.Namespace, overrides: list[str], console: Console, again: str) -> int:
    """Runs what is missing of a claim, tells the verdict, and keeps the results of one that is run as it is written."""
    console.print(f"[bold]{escape(claim.title)}[/]")
    claim = read_claim(claim.grid.file, options.seeds, options.out, overrides)
    try:
        run_grid(claim.grid, options, console, again)
    except (KeyboardInterrupt, SystemExit):
        # Stopped: what is finished need not be run again, here or elsewhere.
        keep(claim, console)
        raise
    if options.dry_run or options.slurm:
        return 0
    results = keep(claim, console)
    judged = verdict(claim, results)
    for line in judged.lines:
        console.print(line, soft_wrap=True, markup=False)
    colour = {"as expected": "green", "not as expected": "red"}.get(judged.word, "yellow")
    console.print(f"[bold {colour}]{judged.word}[/]: {escape(claim.expectation)}", soft_wrap=True)
    return 0 if judged.word in ("as expected", "measured") else 1


def keep(claim: Claim, console: Console) -> Results:
    """Writes the results of a claim that is run as it is written, its picture and the page, if there are new ones;
    returns all."""
    if claim.grid.as_written:
        # Another command may have recorded some of its runs since this one began.
        claim = with_recorded(claim)
    results = collected(claim)
    if claim.grid.as_written and len(results.summary.results) > sum(bool(run.recorded) for run in claim.grid.runs):
        write_results(claim, results, origin(claim))
        console.print(f"written: {claim.file}", soft_wrap=True)
        write([claim], console)
    return results


def collected(claim: Claim) -> Results:
    """What is recorded of a claim, and what its other runs hold that are finished and evaluated."""
    runs = [run for run in claim.grid.runs if not run.recorded]
    runs = [run for run in runs if all(job.is_done() for job in claim.grid.evaluations_after(run))]
    jobs = [(run, job) for run in runs for job in claim.grid.evaluations_after(run)]
    curves = read_settings([job.folder / "state_tracking.json" for _, job in jobs if job.eval == "state_tracking"])
    losses = [losses_of(run, job) for run, job in jobs if job.eval == "length_extrapolation"]
    new = Results(summarise(replace(claim.grid, runs=runs)), curves, losses)
    return together(claim, results_of(claim), new) if claim.grid.as_written else new


def losses_of(run: Run, job: SweepJob) -> Losses:
    """What an evaluation of length extrapolation found at each position."""
    (entry,) = read_results(job.folder / f"{job.eval}.json")
    buckets = entry["buckets"]
    lasts, losses = ([bucket[name] for bucket in buckets] for name in ("last", "loss"))
    return Losses(run.setting, run.seed, job.data, run.config.training.seq_len, lasts, losses)


def origin(claim: Claim) -> dict[str, str]:
    """By what, where and of which data results were made."""
    command = f"python -m launch.reproduce {claim.name}"
    gpus = f", {len(visible_gpus())} GPUs" if visible_gpus() else ""
    about = {"command": command, "machine": f"{platform.machine()}, {os.cpu_count()} cores{gpus}", **versions()}
    config = claim.grid.runs[0].config
    return about | ({"data": check_data(config)} if config.data.kind == "prepared" else {})


def write(claims: list[Claim], console: Console) -> None:
    """Draws the pictures of some claims, and writes the page of all."""
    for claim in claims:
        results = results_of(claim)
        if results.summary.results:
            draw(claim, results, picture_of(claim))
            console.print(f"written: {picture_of(claim)}", soft_wrap=True)
    write_atomically(PAGE, page(read_claims([])))
    console.print(f"written: {PAGE}", soft_wrap=True)


def picture_of(claim: Claim) -> Path:
    return claim.file.with_suffix(".png")


def check(claims: list[Claim], console: Console) -> int:
    """Compares the page, the pictures and the sentences of README.md with what the results make of them."""
    different = []
    if read_text(PAGE) != page(read_claims([])):
        different.append(f"{PAGE}: not what the results make of it")
    readme = " ".join(read_text(README).split())
    with tempfile.TemporaryDirectory() as folder:
        for claim in claims:
            results, file = results_of(claim), picture_of(claim)
            for sentence in sentences(claim):
                if " ".join(sentence.split()) not in readme:
                    different.append(f"{README}: does not say: {sentence}")
            if results.summary.results:
                again = Path(folder, file.name)
                draw(claim, results, again)
                if not file.exists() or not same_picture(file, again):
                    different.append(f"{file}: not the picture of the results")
    for line in different:
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"{len(claims)} claims: {len(different) or 'no'} differences")
    return 1 if different else 0


def same_picture(first: Path, second: Path) -> bool:
    """Whether two PNGs look the same."""
    one, other = matplotlib.image.imread(first), matplotlib.image.imread(second)
    return one.shape == other.shape and float(np.abs(one - other).mean()) <= PIXELS


if __name__ == "__main__":
    exit_on_user_error(main)

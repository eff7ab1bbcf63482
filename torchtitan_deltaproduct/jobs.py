"""Many commands, a few at a time: what is missing runs, and what fails is named at the end and stops nothing else.

    places = places_for(jobs_at_a_time=0, device="auto", jobs=len(jobs))    # one a GPU, or one a core
    failed = run_jobs(jobs, places, console)                                # {"S3/seed-2": "exit code 1: ..."}

Grids of training runs (`launch.grid`) and sweeps of evaluations (`evaluation.sweep`) are such jobs. There is no second
book: a job is done if what it was to make is there, so a list that was killed is gone on with by giving it again. With
SIGINT, SIGTERM or SIGHUP, or the death of the process that started them, the jobs are told to end as well (SIGTERM),
and a trainer saves first.
"""

import argparse
import contextlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .arguments import Parser, at_least, path
from .devices import cores, threads
from .errors import ConfigError, UserError
from .processes import end_with

TAIL = 8
"""Lines of a failed job's log that are shown."""
LINES_OF_AN_ERROR = 4
"""The most lines of our messages, of which the first begins with `error:`; of other output the last line is quoted."""
SECONDS_BETWEEN_LINES = 15.0


class Job:
    """One command.

    Attributes:
        name: what it is called in lists, and by --only.
        command: its words.
        log: the file that gets its output.
    """

    name: str
    command: list[str]
    log: Path

    def obstacle(self) -> str:
        """Why it cannot run now, or ""."""
        return ""

    def is_done(self) -> bool:
        """Whether what it makes is there, by this command."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What comes before its start, beside the folder of its log."""

    def progress(self) -> tuple[int, int, str]:
        """Steps done, steps in all (0: it does not tell) and a few words."""
        return 0, 0, ""

    def state(self) -> str:
        """In a list: `done`, `to run`, or why it cannot."""
        obstacle = self.obstacle()
        return f"not ready: {obstacle}" if obstacle else "done" if self.is_done() else "to run"


OF_SLURM = ("--site", "--gpus", "--time", "--max-parallel")
"""Options of --slurm alone."""


def add_job_options(parser: argparse.ArgumentParser, jobs: int, jobs_default: str) -> None:
    """Adds --dry-run, --collect, --only, --jobs (0 or more) and all of --slurm to a command line."""
    add = parser.add_argument
    add("--dry-run", action="store_true", help="print the jobs and their commands, run nothing")
    add("--collect", action="store_true", help="collect what is there, run nothing")
    add("--only", nargs="+", default=[], metavar="JOB", help="only jobs of these names, or whose names begin so")
    add("--jobs", type=at_least(0), default=jobs, metavar="N", help=f"jobs at a time (default: {jobs_default})")
    add_slurm_options(parser)


def add_slurm_options(parser: argparse.ArgumentParser) -> None:
    """Adds --slurm and what is read beside it alone."""
    add, count = parser.add_argument, {"type": at_least(0), "default": 0, "metavar": "N"}
    add("--slurm", action="store_true", help="submit what is missing as a SLURM array")
    add("--site", type=path, metavar="FILE", help="site TOML of --slurm (see launch/site_example.toml)")
    add("--gpus", **count, help="of each task of --slurm (default: %(default)s)")
    add("--time", default="", help="limit of each task of --slurm (default: the site's)")
    add("--max-parallel", **count, help="tasks of --slurm at a time (default: no limit)")


def without_slurm(module: str, words: list[str]) -> str:
    """The command of a module, without --slurm and what is read beside it alone."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_slurm_options(parser)
    return shlex.join(["python", "-m", module, *parser.parse_known_args(words)[1]])


def refuse_unread(parser: Parser, options: argparse.Namespace) -> None:
    """Raises ConfigError for one of these options that would not be read beside, or without, another."""
    given = parser.given(options)
    both = [name for name in ("--collect", "--dry-run" if options.dry_run else "--slurm") if name in given]
    if len(both) > 1:
        raise ConfigError(f"{' and '.join(both)}: expected one of them")
    if not options.slurm and (alone := [name for name in OF_SLURM if name in given]):
        raise ConfigError(f"{', '.join(alone)}: only read with --slurm")
    if options.slurm and "--jobs" in given:
        raise ConfigError("--jobs: not read with --slurm, whose tasks at a time are --max-parallel")


def chosen(jobs: Sequence[Job], only: list[str]) -> list[Job]:
    """The jobs named, or whose names begin with the same parts, or all; raises ConfigError for a name that is none."""
    for name in only:
        if not any(f"{job.name}/".startswith(f"{name}/") for job in jobs):
            raise ConfigError(f"--only {name}: no such job; there are: {', '.join(job.name for job in jobs)}")
    return [job for job in jobs if not only or any(f"{job.name}/".startswith(f"{name}/") for name in only)]


Submit = Callable[[list[list[str]], Path, str, argparse.Namespace], tuple[str, Path]]
"""Hands commands to SLURM as one array, given the folder of its own folder, its name and the options above; returns its
job id, and its own folder."""


def listed_or_submitted(
    jobs: Sequence[Job],
    commands: dict[str, list[str]],
    options: argparse.Namespace,
    console: Console,
    *,
    folder: Path,
    name: str,
    submit: Submit | None,
    again: str,
) -> bool:
    """Does what --dry-run or --slurm asks for; False if neither is there, and the jobs are to be run here.

    Args:
        jobs: the chosen ones.
        commands: by the name of a job, what a task of an array runs.
        options: of `add_job_options`.
        console: for what is told.
        folder: of the arrays' folders.
        name: of the array.
        submit: to SLURM; None: it cannot be done from here, ConfigError.
        again: the command for when the array is done.
    """
    if options.dry_run:
        table = Table("job", "state")
        for job in jobs:
            table.add_row(job.name, job.state())
        console.print(table)
        for job in jobs:
            console.print(shlex.join(["python", *job.command[1:]]), soft_wrap=True, style="dim", markup=False)
        return True
    if not options.slurm:
        return False
    if submit is None:
        raise ConfigError("--slurm: expected `python -m eval.sweep`, run from the repository root")
    todo = [commands[job.name] for job in jobs if not job.is_done() and not job.obstacle()]
    if not todo:
        console.print("nothing to submit: every job is done, or its model is not ready")
        return True
    array, folder = submit(todo, folder, name, options)
    # More tasks than the cluster takes at once are several arrays, `12,13`.
    first = array.partition(",")[0]
    console.print(f"job {array}: {len(todo)} tasks; tail -f {folder}/{first}_0.out", soft_wrap=True, markup=False)
    console.print(f"when they are done: {again}", soft_wrap=True, markup=False)
    return True


def places_for(at_a_time: int, device: str, jobs: int, gpus_each: int = 1) -> list[dict[str, str]]:
    """Where jobs run: the environment variables of each of the places that are used at one time.

    Args:
        at_a_time: jobs at a time; 0: one a GPU, or without any one a CPU core.
        device: `auto`, or `cpu` to leave GPUs alone.
        jobs: how many there are to run.
        gpus_each: of a job; one that needs more than there are gets all.
    """
    visible = visible_gpus() if device == "auto" else []
    firsts = range(0, max(len(visible) - gpus_each, 0) + 1, gpus_each) if visible else []
    gpus = [",".join(visible[first : first + gpus_each]) for first in firsts]
    count = max(1, min(at_a_time or len(gpus) or cores(), jobs))
    # Alone a job has the machine, as a command typed by hand would.
    own = os.environ.get("OMP_NUM_THREADS") or str(threads(count * gpus_each))
    shared = {"OMP_NUM_THREADS": own} if count > 1 else {}
    if not gpus:
        return [shared | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})] * count
    # Round the GPUs: with more places than GPUs there are several on some.
    return [shared | {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} for place in range(count)]


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; without an import of torch."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    try:
        printed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [str(number) for number in range(len(re.findall(r"^GPU \d+:", printed.stdout, re.MULTILINE)))]


def run_jobs(
    jobs: Sequence[Job],
    places: list[dict[str, str]],
    console: Console,
    then: Callable[[Job], Sequence[Job]] = lambda job: (),
) -> dict[str, str]:
    """Runs what is missing of some jobs, one in each place at a time.

    Args:
        jobs: in the order of their starts.
        places: environment variables of each place, as of `places_for`.
        console: for the lines of progress.
        then: the jobs that follow one as soon as it is done; of a failed one they are left out.

    Returns:
        By name, why a job is not done: the exit code and the last line of its log, its obstacle, or why it did not
        start.
    """
    everything = [one for job in jobs for one in (job, *then(job))]
    total = sum(not job.is_done() for job in everything)
    console.print(f"{len(everything)} jobs, {len(everything) - total} done already")
    waiting: deque[Job] = deque()
    failed: dict[str, str] = {}

    def admit(job: Job, enter: Callable[[Job], None]) -> None:
        if job.is_done():
            for follower in then(job):
                admit(follower, enter)
        elif why := job.obstacle():
            failed[job.name] = f"not ready: {why}"
            console.print(f"{job.name}: {why}", soft_wrap=True, markup=False)
        else:
            enter(job)

    for job in jobs:
        admit(job, waiting.append)
    total -= len(failed)
    started = itertools.count(1)
    running: dict[int, Running] = {}
    with Display(total, console) as display, ending_together(running, console):
        while waiting or running:
            for place in range(len(places)):
                if place not in running and waiting:
                    job = waiting.popleft()
                    label = f"{next(started)}/{total} {job.name}"
                    try:
                        running[place] = Running(job, label, places[place])
                    except OSError as error:
                        failed[job.name] = f"it cannot be started: {error}"
                        console.print(f"{label}: {failed[job.name]}", soft_wrap=True, markup=False)
                        continue
                    display.starts(running[place])
            time.sleep(0.1)
            display.update(list(running.values()))
            for place, one in list(running.items()):
                if one.process.poll() is not None:
                    del running[place]
                    why = one.failure()
                    display.ends(one, why)
                    if why:
                        failed[one.job.name] = why
                    for follower in () if why else then(one.job):
                        admit(follower, waiting.appendleft)
    return failed


class Running:
    """A job that was started, its output going to its log."""

    def __init__(self, job: Job, label: str, environment: dict[str, str]):
        self.job, self.label, self.start = job, label, time.monotonic()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.prepare()
        parent = os.getpid()
        with job.log.open("ab") as log:
            self.log_begins = log.tell()
            self.process = subprocess.Popen(
                job.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                # However this process ends, by SIGKILL, too: a job left behind would be in the way of the next one.
                env=os.environ | environment, preexec_fn=lambda: end_with(parent),
            )  # fmt: skip

    def lines(self) -> list[str]:
        """What it has printed, line by line."""
        with self.job.log.open("rb") as log:
            log.seek(max(self.log_begins, log.seek(0, os.SEEK_END) - 65536))
            return [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]

    def failure(self) -> str:
        """Why it is not done, now that it has ended; "" if it is."""
        code = self.process.returncode
        try:
            if code == 0 and self.job.is_done():
                return ""
        except UserError as error:
            return str(error)
        ending = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        lines = (self.lines() or ["it printed nothing"])[-LINES_OF_AN_ERROR:]
        begin = max((place for place, line in enumerate(lines) if line.startswith("error:")), default=len(lines) - 1)
        last = " ".join(lines[begin:])
        return f"{ending}{' before its end' if code == 0 else ''}: {last}"


@contextlib.contextmanager
def ending_together(running: dict[int, Running], console: Console) -> Iterator[None]:
    """Ends the running jobs, and waits for them, when the block is left early; SIGINT, SIGTERM and SIGHUP leave it.

    Once: `timeout` sends its signal twice, people press Ctrl-C twice, and the jobs still have to save.
    """
    # Under nohup SIGHUP stays ignored, in the background of a shell SIGINT.
    handled = {number: handler for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
               if (handler := signal.getsignal(number)) != signal.SIG_IGN}  # fmt: skip

    def leave(received: int, frame: FrameType | None) -> None:
        for number in handled:
            signal.signal(number, lambda received, frame: None)
        raise KeyboardInterrupt if received == signal.SIGINT else SystemExit(128 + received)

    for number in handled:
        signal.signal(number, leave)
    try:
        yield
    finally:
        if running:
            names = ", ".join(one.job.name for one in running.values())
            console.print(f"stopping {names}; the same command goes on from there", soft_wrap=True, markup=False)
        for one in running.values():
            one.process.terminate()
        for one in running.values():
            one.process.wait()
        for number, handler in handled.items():
            signal.signal(number, handler)


class Display:
    """Progress of the jobs: bars of the running ones on a terminal, a line a job every 15 seconds elsewhere."""

    def __init__(self, total: int, console: Console):
        self.console, self.last_lines, self.bars = console, time.monotonic(), None
        self.tasks: dict[str, int] = {}
        if console.is_terminal and total:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bars = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)

    def __enter__(self) -> "Display":
        if self.bars:
            self.bars.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bars:
            self.bars.stop()

    def starts(self, one: Running) -> None:
        if self.bars:
            self.tasks[one.label] = self.bars.add_task(one.label, total=one.job.progress()[1] or None, note="starting")
        else:
            self.console.print(f"{one.label} ...", soft_wrap=True, markup=False)

    def update(self, running: list[Running]) -> None:
        """Shows where the running jobs are, which they read from their files."""
        if time.monotonic() - self.last_lines < (1.0 if self.bars else SECONDS_BETWEEN_LINES):
            return
        self.last_lines = time.monotonic()
        for one in running:
            step, total, note = one.job.progress()
            if self.bars:
                self.bars.update(self.tasks[one.label], completed=step, note=note)
            elif total:
                self.console.print(f"{one.label}: step {step:,} of {total:,}, {note}", soft_wrap=True, markup=False)

    def ends(self, one: Running, failure: str) -> None:
        """Says how a job ended, with the end of its log if it failed."""
        if self.bars:
            self.bars.remove_task(self.tasks.pop(one.label))
        if not failure:
            self.console.print(
                f"{one.label}: done in {time.monotonic() - one.start:.0f} s", soft_wrap=True, markup=False
            )
            return
        self.console.print(
            f"{one.label}: failed with {failure.partition(':')[0]}; {one.job.log} ends:", soft_wrap=True, markup=False
        )
        self.console.print("\n".join(f"    {line}" for line in one.lines()[-TAIL:]), soft_wrap=True, markup=False)


def report_failures(failed: dict[str, str], console: Console) -> None:
    """Names the jobs that are not done, a line each."""
    if failed:
        console.print(f"{len(failed)} of the jobs {'is' if len(failed) == 1 else 'are'} not done:")
        for name, why in failed.items():
            console.print(f"  {name}: {why}", soft_wrap=True, markup=False)

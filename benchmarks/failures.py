"""Kills a run again and again at random moments, and says what each failure cost.

    python -m benchmarks.failures train_configs/quickstart.toml --kills 10 --training.steps 300
    python -m benchmarks.failures X.toml --ranks 8 --kills 20 --every 600 --out /scratch/failures

Everything of the run is killed (SIGKILL), as when its node dies, and started again at once, as a scheduler would; the
time between kills is drawn from an exponential distribution with a mean of `--every` seconds, counted from the first
step of a launch, so that each launch trains. Further arguments go to the trainer. It prints, over all failures:

    start-up    seconds from the kill to the end of the first step: processes, imports, checkpoint, compilation
    lost        seconds of the further steps that are done again, until the run is where it was
    goodput     share of the wall time that was spent in steps that count, as `status` tells it

and what that comes to at one failure an hour: 1 - (start-up + lost) / 3600, saves aside. Where loss and gradient norm
of a step that is done again differ from the first time, it says so and ends with exit code 1.
"""

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.tables import columns
from torchtitan_deltaproduct.arguments import path
from torchtitan_deltaproduct.errors import ConfigError, exit_on_user_error
from torchtitan_deltaproduct.history import read_metrics

HOUR = 3600.0


@dataclass
class Failure:
    """One kill: the last step that was done, the one it went on from, and what that took in seconds."""

    at: int
    from_step: int
    start_up: float
    lost: float


class Run:
    """A training run that is started and killed.

    Args:
        config: its TOML.
        folder: its run folder, which must be new.
        ranks: processes.
        words: further arguments of the trainer.
    """

    def __init__(self, config: str, folder: Path, ranks: int, words: list[str]) -> None:
        self.folder, self.seen = folder, {}
        self.different: set[int] = set()
        train = ["-m", "torchtitan_deltaproduct.train", "--job.config_file", config, "--job.dump_folder", str(folder)]
        torchrun = ["-m", "launch.torchrun", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        self.command = [sys.executable, *torchrun, *train, "--metrics.log_freq", "1", *words]

    def start(self) -> subprocess.Popen:
        with open(f"{self.folder}.log", "ab") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)

    def steps(self) -> list[dict]:
        """The records of training steps so far; notes each that is not what it was the last time."""
        records = [record for record in read_metrics(self.folder) if "loss" in record]
        for record in records:
            learned = record["loss"], record["grad_norm"]
            if self.seen.setdefault(record["step"], learned) != learned:
                self.different.add(record["step"])
        return records

    def wait_for_a_step(self, process: subprocess.Popen, after: float) -> list[dict]:
        """Waits for the first step done later than a time; [] if the run ended instead."""
        while True:
            ended = process.poll() is not None
            records = [record for record in self.steps() if record["time"] > after]
            if records or ended:
                return records
            time.sleep(0.05)

    def kill(self, process: subprocess.Popen) -> None:
        """SIGKILL to the process and all below it; torchrun's workers have sessions of their own."""
        listing = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        parents = dict(tuple(map(int, line.split())) for line in listing.splitlines())
        doomed = {process.pid}
        while more := {pid for pid, parent in parents.items() if parent in doomed} - doomed:
            doomed |= more
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def kill_again_and_again(run: Run, kills: int, every: float, generator: random.Random, say) -> list[Failure]:
    """Runs to the end, with up to `kills` failures on the way.

    Raises:
        ConfigError: the run ended by itself and did not finish.
    """
    failures: list[Failure] = []
    process, last = run.start(), None
    while True:
        began = time.time() if last is None else last["killed"]
        records = run.wait_for_a_step(process, began)
        if records and last is not None:
            again = records[0]
            lost = [record for record in last["steps"] if record["step"] > again["step"]]
            failures.append(
                Failure(last["steps"][-1]["step"], again["step"] - 1, again["time"] - last["killed"],
                        sum(record["seconds"] for record in lost))
            )  # fmt: skip
            say(len(failures), failures[-1])
        if len(failures) == kills or not records:
            break
        try:
            process.wait(generator.expovariate(1 / every))
        except subprocess.TimeoutExpired:
            run.kill(process)
            last = {"killed": time.time(), "steps": run.steps() or records}
            process = run.start()
        else:
            break
    if process.wait() != 0:
        raise ConfigError(f"the run ended with exit code {process.returncode}; {run.folder}.log says why")
    run.steps()
    return failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.failures", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("config", type=path, metavar="TOML", help="of the run")
    parser.add_argument("--kills", type=int, default=10, help="most failures (default: %(default)s)")
    parser.add_argument("--every", type=float, default=20.0, metavar="SECONDS", help="mean time of training between")
    parser.add_argument("--ranks", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--out", type=path, default="outputs/failures", help="run folder (default: %(default)s)")
    options, words = parser.parse_known_args(arguments)
    for name in ("kills", "every", "ranks"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name} {getattr(options, name)}: must be above 0")
    folder, console = Path(options.out), Console(highlight=False)
    if folder.exists():
        raise ConfigError(f"{folder} is there already: delete it, or name another folder by --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    run = Run(options.config, folder, options.ranks, words)

    def say(number: int, failure: Failure) -> None:
        console.print(
            f"failure {number}: killed after step {failure.at:,}, went on from {failure.from_step:,}; "
            f"start-up {failure.start_up:.1f} s, lost {failure.lost:.1f} s"
        )

    failures = kill_again_and_again(run, options.kills, options.every, random.Random(options.seed), say)
    if not failures:
        raise ConfigError("the run ended before the first failure; give more steps, or a smaller --every")
    console.print(table(failures, run.steps()[-1].get("goodput")))
    if run.different:
        console.print(f"not the same when done again: steps {', '.join(map(str, sorted(run.different)[:10]))}")
    return 1 if run.different else 0


def table(failures: list[Failure], goodput: float | None) -> Table:
    """The costs over all failures."""
    shown = Table("", *columns("median", "worst"), title=f"{len(failures)} failures")
    for name, values in (
        ("start-up, s", [failure.start_up for failure in failures]),
        ("lost, s", [failure.lost for failure in failures]),
        ("steps done again", [failure.at - failure.from_step for failure in failures]),
    ):
        shown.add_row(name, f"{statistics.median(values):.1f}", f"{max(values):.1f}")
    cost = statistics.mean(failure.start_up + failure.lost for failure in failures)
    shown.add_row("goodput of this run", f"{goodput:.1%}" if goodput else "", "")
    shown.add_row("at a failure an hour", f"{1 - cost / HOUR:.2%}", "")
    return shown


if __name__ == "__main__":
    exit_on_user_error(main)

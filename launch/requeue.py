"""Shall a job that ended be requeued? The sbatch files of `launch.slurm` ask this when torchrun is done.

    python -m launch.requeue RUN --max 10 --code 138 --since 1764000000.0 --ended-by-slurm no

    run's last stop      requeued?   why
    signal, walltime     yes         preempted or out of time, and saved; SIGINT is a person's wish and ends it
    hung, lost_peer,     yes         the next start may have better luck; not after three launches without progress
    machine, killed
    finished             no          there is nothing left to do
    failed               no          it would fail again

At most --max times in all, SLURM's own requeues included. The answer and its reason are printed and added to
RUN/launch/requeues.log. Exit code: 75 to requeue, 0 if the run is finished, else 1.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from signal import Signals
from typing import Any

from torchtitan_deltaproduct.errors import exit_on_user_error
from torchtitan_deltaproduct.events import last_stop, read_events

REQUEUE, FINISHED, END = 75, 0, 1
LAUNCHES_WITHOUT_PROGRESS = 3


def decide(
    events: list[dict[str, Any]], restarts: int, maximum: int, code: int = 1, ended_by_slurm: bool = False
) -> tuple[bool, str]:
    """Whether to requeue a job, and why.

    Args:
        events: those of this start of the job, oldest first, as `read_events` returns them.
        restarts: how often the job was requeued before (SLURM_RESTART_COUNT).
        maximum: how often it may be.
        code: exit code of srun; above 128 for a signal.
        ended_by_slurm: the batch script got SIGTERM: SLURM cancels, preempts or requeues the job of its own accord.
    """
    stop = last_stop(events)
    reason = stop["reason"] if stop else None
    requeue, why = judge_stop(stop) if stop else judge_silence(events, code)
    if ended_by_slurm and reason not in ("finished", "failed"):
        return False, f"{why}; SLURM ends the job (cancelled or preempted) and decides what follows"
    newest = [event["step"] for event in events if event["event"] == "launch"][-LAUNCHES_WITHOUT_PROGRESS:]
    stuck = len(newest) == LAUNCHES_WITHOUT_PROGRESS and len(set(newest)) == 1
    if requeue and stuck and reason not in ("signal", "walltime"):
        return False, f"{why}; {LAUNCHES_WITHOUT_PROGRESS} launches in a row came no further"
    if requeue and restarts >= maximum:
        return False, f"{why}; but it was requeued {restarts} times already, of at most {maximum}"
    return requeue, why


def of_this_start(events: list[dict[str, Any]], since: float) -> list[dict[str, Any]]:
    """The events of this start of the job: from the first launch that names it, or that came after it by the clock.

    By the clock alone they would be missed where it was set back, or differs between the nodes.
    """
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    for place, event in enumerate(events):
        here = event["event"] == "launch" and event.get("slurm_job") == os.environ.get("SLURM_JOB_ID", "")
        if (here and (event.get("slurm_restart") or 0) == restart) or event.get("time", 0) >= since:
            return events[place:]
    return []


def judge_stop(stop: dict[str, Any]) -> tuple[bool, str]:
    """The answer for a run that left word of its stop."""
    reason, detail = stop["reason"], stop.get("detail")
    at = "before training began" if stop["step"] is None else f"at step {stop['step']:,}"
    ending = f"{reason} {at}" + (f": {detail}" if detail else "")
    if reason in ("signal", "walltime") and not stop.get("saved"):
        ending += ", without a new checkpoint"
    if detail == "SIGINT":
        return False, f"{ending}; a person stopped it"
    return reason in ("signal", "walltime", "hung", "lost_peer", "machine"), ending


def judge_silence(events: list[dict[str, Any]], code: int) -> tuple[bool, str]:
    """The answer for a run that left none: it was killed, or never began."""
    launches = [event["step"] for event in events if event["event"] == "launch"]
    if code > 128:
        how = f"killed by {Signals(code - 128).name}" if code - 128 in list(Signals) else f"killed (exit code {code})"
    else:
        how = f"ended with exit code {code}"
    if not launches:
        return code > 128, f"{how} before training began"
    ending = f"{how} after step {launches[-1]:,}, without a word"
    return code != 0, ending


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    job, restarts = os.environ.get("SLURM_JOB_ID", "?"), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    events = of_this_start(read_events(options.run), options.since)
    # At its time limit SLURM ends a job as well, but there nobody wished it to end.
    out_of_time = time.time() >= float(os.environ.get("SLURM_JOB_END_TIME") or "inf")
    ended_by_slurm = options.ended_by_slurm == "yes" and not out_of_time
    requeue, why = decide(events, restarts, options.max, options.code, ended_by_slurm)
    line = f"job {job}, requeued {restarts} times: {'requeue' if requeue else 'no requeue'}: {why}"
    print(line, flush=True)
    try:
        log = options.run / "launch/requeues.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {line}\n")
    except OSError as error:
        print(f"warning: not noted in requeues.log: {error}", file=sys.stderr)
    stop = last_stop(events)
    return REQUEUE if requeue else FINISHED if stop and stop["reason"] == "finished" else END


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.requeue", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run folder, with events.jsonl")
    add("--max", type=int, required=True, help="requeues in all")
    add("--code", type=int, required=True, help="exit code of srun")
    add("--since", type=float, required=True, help="when this start of the job began, in seconds of the epoch")
    add("--ended-by-slurm", choices=("yes", "no"), default="no", help="whether the batch script got SIGTERM")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    exit_on_user_error(main)

"""Evaluations as a SLURM array: one task for each command, say each (checkpoint, dataset).

    commands = [["python", "-m", "eval.x", step, data] for step in steps for data in datasets]
    job = submit_array(commands, folder, load_site(None)[0], name="eval", gpus=1, max_parallel=8)

The commands are written to FOLDER/tasks.jsonl, a list of words a line, and the bounds of the array are the number of
lines, so that the two cannot disagree. Task 3 prints to FOLDER/JOB_3.out and runs

    python -m launch.arrays FOLDER/tasks.jsonl 3

which names the task, and names it again if it fails; its exit code is the command's.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from torchtitan_deltaproduct.errors import ConfigError, UserError, exit_on_user_error
from torchtitan_deltaproduct.files import read_text

from .record import CODE, snapshot_code
from .sbatch import (
    ask,
    literal,
    of_site,
    preamble,
    python,
    refuse_control_characters,
    require_sbatch,
    resources,
    submit,
)
from .site import Site

USAGE = "usage: python -m launch.arrays TASKS.jsonl NUMBER"


def submit_array(
    commands: list[list[str]], folder: Path, site: Site, *, name: str = "eval", gpus: int = 0, time: str = "",
    max_parallel: int = 0,
) -> str:  # fmt: skip
    """Writes tasks.jsonl and job.sbatch to `folder` and submits the array, or several where the cluster takes no more.

    Args:
        commands: words of each task; relative paths count from the current folder.
        folder: for the files, the code and the output of the tasks; made if need be.
        site: what the cluster wants to hear.
        name: the job's name.
        gpus: GPUs of a task.
        time: limit of a task; empty: the site's.
        max_parallel: tasks that run at a time; 0: as many as there is room for.

    Returns:
        The job id; task i is `ID_i`. Of several arrays, their ids with commas between.

    Raises:
        ConfigError: there are no commands. UserError: there is no sbatch, or it refused.
    """
    require_sbatch()
    folder, largest = Path(folder).absolute(), max_array_size()
    firsts = range(0, len(commands), largest) if commands else [0]
    at_a_time = max(1, max_parallel // len(firsts)) if max_parallel else 0
    texts = [
        render_array(commands, folder, site, name=name, gpus=gpus, time=time, max_parallel=at_a_time,
                     tasks=range(first, min(first + largest, len(commands))))
        for first in firsts
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    snapshot_code(folder)
    lines = "".join(json.dumps(words) + "\n" for words in commands)
    (folder / "tasks.jsonl").write_text(lines, encoding="utf-8")
    numbers = []
    for part, text in enumerate(texts, start=1):
        script = folder / ("job.sbatch" if part == 1 else f"job-{part}.sbatch")
        script.write_text(text, encoding="utf-8")
        try:
            numbers.append(submit(script))
        except UserError as error:
            sent = f"\nsubmitted before it: {', '.join(numbers)}" if numbers else ""
            limit = f"{largest:,}" if largest < sys.maxsize else "not known here"
            reason = f"tasks of an array, by MaxArraySize of scontrol show config: at most {limit}"
            raise UserError(f"{error}\n{reason}{sent}") from None
    return ",".join(numbers)


def max_array_size() -> int:
    """Tasks an array of this cluster may have; no limit where it does not say."""
    try:
        shown = ask("scontrol", "show", "config")
    except OSError:
        return sys.maxsize
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown.stdout, re.MULTILINE)
    # It is the first number that no task may have, and 0 forbids arrays: sbatch will say so.
    return max(1, int(match[1])) if match else sys.maxsize


def render_array(
    commands: list[list[str]], folder: Path, site: Site, *, name: str = "eval", gpus: int = 0, time: str = "",
    max_parallel: int = 0, tasks: range | None = None,
) -> str:  # fmt: skip
    """The sbatch file of `submit_array`, for tasks.jsonl in `folder`.

    Args:
        tasks: those of this array, numbered from 0 in it; None: all. The others are as of `submit_array`.
    """
    if not commands:
        raise ConfigError(f"an array of no tasks: there is nothing to run for {name}")
    refuse_control_characters({
        "the array's name": name, "its folder": folder, "the current folder": Path.cwd(), "--time": time,
        **of_site(site),
    })  # fmt: skip
    tasks = tasks or range(len(commands))
    at_a_time = f"%{max_parallel}" if max_parallel else ""
    asked = resources(
        site, name=name, nodes=1, ranks=1, gpus=gpus, time=time,
        output=f"{literal(folder)}/%A_%a.out", workdir=Path.cwd(),
    )  # fmt: skip
    container = f"srun --ntasks=1 {site.container} " if site.container else ""
    number = f"$((SLURM_ARRAY_TASK_ID + {tasks.start}))" if tasks.start else "$SLURM_ARRAY_TASK_ID"
    return "\n".join([
        "#!/bin/bash",
        f"# {name}: {len(tasks)} tasks, one for each line of {folder}/tasks.jsonl; written by launch.arrays.",
        "",
        *asked,
        f"#SBATCH --array=0-{len(tasks) - 1}{at_a_time}",
        "# A task that is preempted starts again.",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "",
        preamble(site, folder / CODE),
        "",
        f"exec {container}{python(site)} -m launch.arrays {shlex.quote(f'{folder}/tasks.jsonl')} "
        f'"{number}"',
        "",
    ])  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs one task."""
    words = sys.argv[1:] if arguments is None else arguments
    if len(words) != 2 or not words[1].isdecimal():
        raise ConfigError(USAGE)
    tasks, number = read_tasks(Path(words[0])), int(words[1])
    if number >= len(tasks):
        raise ConfigError(f"task {number}: {words[0]} has tasks 0 to {len(tasks) - 1}")
    command = tasks[number]
    label = f"task {number} of 0-{len(tasks) - 1}"
    print(f"{label}: {shlex.join(command)}", flush=True)
    code = run(command)
    if code:
        print(f"{label} failed with {tell(code)}: {shlex.join(command)}", file=sys.stderr, flush=True)
    return code if code >= 0 else 128 - code


def read_tasks(path: Path) -> list[list[str]]:
    """The commands in a tasks.jsonl; raises UserError."""
    try:
        tasks = [json.loads(line) for line in read_text(path).splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a list of tasks: {error}") from None
    for number, task in enumerate(tasks):
        if not isinstance(task, list) or not task or not all(isinstance(word, str) for word in task):
            raise UserError(f"{path}:{number + 1}: expected a list of words, such as [\"python\", \"-m\", \"eval.x\"]")
    return tasks


def run(command: list[str]) -> int:
    """Runs a command, handing SIGTERM and SIGUSR1 on to it; negative: the signal that ended it."""
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}") from None
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda got, frame: process.send_signal(got))
    return process.wait()


def tell(code: int) -> str:
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name


if __name__ == "__main__":
    exit_on_user_error(main)

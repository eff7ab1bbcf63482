"""The sbatch files of this project, meant to be read: of a training job, and of an array of commands.

    text = render(TrainingJob(...), site)          # tests/launch/job.sbatch is one
    job = submit(folder / "job.sbatch")            # "12345"
    jobs, folder = submit_array([["python", "-m", "eval.x", step] for step in steps], launches, site, gpus=1)

A training job is one torchrun a node; they find the others at the first node, hand signals on to their ranks and wait
for them to save; then `launch.requeue` decides whether the job goes back into the queue. Each array has a FOLDER of its
own, LAUNCHES/001, 002, ... Its commands are written to FOLDER/tasks.jsonl, a list of words a line, and the bounds of
the array are the number of lines, so that the two cannot disagree. Task 3 prints to FOLDER/JOB_3.out, names its command
and, if that fails, names it again:

    python -m launch.sbatch FOLDER/tasks.jsonl 3
"""

import argparse
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from torchtitan_deltaproduct.config.snapshots import REVISION, versions
from torchtitan_deltaproduct.errors import ConfigError, UserError, exit_on_user_error
from torchtitan_deltaproduct.files import control_characters, read_text

from .node import TRAIN, Layout
from .site import Site, load_site

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torchtitan_deltaproduct", "launch", "eval")


@dataclass(frozen=True)
class TrainingJob:
    """One training job."""

    config: Path
    """The TOML the ranks read."""
    overrides: list[str]
    """`--section.key value` words for the trainer."""
    run: Path
    """The run folder."""
    folder: Path
    """RUN/launch/NNN: sbatch file, output, and what was recorded."""
    workdir: Path
    """Where the job starts: relative paths of the TOML count from here."""
    code: Path
    """Folder of the code that runs: a copy in `folder`, or the checkout."""
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    name: str
    time: str = ""
    dependency: str = ""
    max_requeues: int = 10
    max_restarts: int = 3

    @property
    def size(self) -> str:
        """`2 nodes x 8 ranks`."""
        counts = ((self.nodes, "node"), (self.ranks_per_node, "rank"))
        return " x ".join(f"{count} {what}{'s' * (count > 1)}" for count, what in counts)


def render(job: TrainingJob, site: Site) -> str:
    """The sbatch file of a training job.

    Raises:
        ConfigError: a value that would not stay on its line.
    """
    refuse_control_characters(site, {
        # Folders after those they lie in: the first that holds one is to blame.
        "the TOML's name": job.config.name, "an override": job.overrides, "the current folder": job.workdir,
        "job.dump_folder": job.run, "the launch's folder": job.folder, "the code's folder": job.code,
        "--job-name": job.name, "--time": job.time, "--dependency": job.dependency,
    })  # fmt: skip
    asked = directives(
        site, job.nodes, job.ranks_per_node, job.gpus_per_node, name=job.name, time=job.time,
        output=f"{literal(job.folder)}/%j.out", workdir=job.workdir, dependency=job.dependency,
    )  # fmt: skip
    return f"""\
#!/bin/bash
# {job.name} on {job.size}, written by python -m launch.slurm.
#
#   scancel --signal=USR1 JOB     save and requeue, as before the time limit (at most {job.max_requeues} times)
#   scancel --signal=INT JOB      save and end
#   scancel JOB                   end; the ranks have KillWait (scontrol show config) to save

{asked}
# Requeued, the job keeps its id and goes on in the same output file.
#SBATCH --requeue
#SBATCH --open-mode=append
# The ranks are told to save so many seconds before the time limit; SLURM may do it up to 60 s earlier.
#SBATCH --signal=USR1@{site.signal_seconds}

{preamble(site, job.code)}

# The ranks want to know when their time is over; SLURM 22.05 does not tell.
end="$(SLURM_TIME_FORMAT=standard squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e || true)"
if [[ "$end" == *T* ]]; then
  SLURM_JOB_END_TIME="$(date --date="$end" +%s)"
  export SLURM_JOB_END_TIME
fi

{train_and_requeue(job, site)}
"""


def train_and_requeue(job: TrainingJob, site: Site) -> str:
    """The part of the script that does something: a torchrun on every node, and what came of it."""
    # A tenth of the time that is left is kept for the decision on the requeue.
    seconds = max(1, site.signal_seconds * 9 // 10)
    # In the container as well: outside it there may be no Python of ours.
    decide_in = f"srun --nodes=1 --ntasks=1 {site.container} " if site.container else ""
    return f"""\
{rendezvous(site) if job.nodes > 1 else ""}\
echo "$(date '+%F %T') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, requeued ${{SLURM_RESTART_COUNT:-0}} times"
start="$(date +%s.%N)"
code=0
# SIGTERM to this script: SLURM ends the job (cancelled, preempted, out of time). It stays until the ranks are done.
ended_by_slurm=no
trap 'ended_by_slurm=yes' TERM

# One torchrun a node. It gives the ranks SHUTDOWN_TIMEOUT seconds to save after a signal, and a node that is done
# leaves the others as long (--wait) instead of killing them.
export SHUTDOWN_TIMEOUT={seconds}
{torchrun(job, site, seconds)} || code=$?
trap - TERM

# Requeue? launch/requeue.py says what is and what is not; the answer is kept in launch/requeues.log of the run folder.
verdict=0
{decide_in}{python(site)} -m launch.requeue {shlex.quote(str(job.run))} --max {job.max_requeues} \\
  --code "$code" --since "$start" --ended-by-slurm "$ended_by_slurm" || verdict=$?
if [ "$verdict" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$verdict\""""


def rendezvous(site: Site) -> str:
    """Shell lines that say where several nodes meet."""
    listed = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)'
    return f"""\
# The nodes meet at the first of them, on a port of this job's own, under a name that nobody can guess.
first={shlex.quote(site.rdzv_host) if site.rdzv_host else listed}
endpoint="$first:$((20000 + SLURM_JOB_ID % 10000))"
meeting="$(od -An -N16 -tx8 /dev/urandom | tr -d ' \\n')"

"""


def torchrun(job: TrainingJob, site: Site, seconds: int) -> str:
    """The srun command, an option or two a line."""
    meeting = ('"$endpoint"', '"$meeting"') if job.nodes > 1 else ("", "")
    words = Layout(job.nodes, job.ranks_per_node, job.max_restarts, *meeting).torchrun_arguments()
    # srun does not take this over from sbatch since SLURM 22.05.
    cores = f" --cpus-per-task={job.ranks_per_node * site.cpus_per_rank}" if site.cpus_per_rank else ""
    overrides: list[list[str]] = []
    for word in job.overrides:
        if word.startswith("--") or not overrides:
            overrides.append([])
        overrides[-1].append(word)
    lines = [
        f"srun --ntasks-per-node=1{cores} --kill-on-bad-exit=0 --wait={seconds}",
        f"  {site.container}",
        f"  {python(site)} -m launch.torchrun",
        f"    {' '.join(words[:3])}",
        f"    {' '.join(words[3:])}",
        f"    -m {TRAIN}",
        f"    --job.config_file {shlex.quote(str(job.config))}",
        *(f"    {shlex.join(override)}" for override in overrides),
    ]
    return " \\\n".join(line for line in lines if line.strip())


def submit_array(
    commands: list[list[str]], launches: Path, site: Site, *, max_parallel: int = 0, **asked: str | int
) -> tuple[str, Path]:
    """Writes tasks.jsonl and job.sbatch to a new folder and submits them, as several arrays where one is too small.

    Args:
        commands: words of each task; relative paths count from the current folder.
        launches: holds the new folder, which gets the files, the code and the output of the tasks.
        site: what the cluster wants to hear.
        max_parallel: tasks that run at a time; 0: as many as there is room for.
        asked: the `name` of the job, and `gpus` and `time` limit (empty: the site's) of a task.

    Returns:
        The job id, and the folder; task i is `ID_i`. Of several arrays, their ids with commas between.

    Raises:
        ConfigError: there are no commands. UserError: there is no sbatch, or it refused.
    """
    require_sbatch()
    if not commands:
        raise ConfigError("an array of no tasks: there is nothing to run")
    launches, largest = Path(launches).absolute(), max_array_size()
    parts = [range(len(commands))[first : first + largest] for first in range(0, len(commands), largest)]
    asked["max_parallel"] = max(1, max_parallel // len(parts)) if max_parallel else 0
    # What is wrong with them is told before anything is made.
    render_array(parts[0], next_folder(launches), site, **asked)
    folder = new_folder(launches)
    texts = [render_array(part, folder, site, **asked) for part in parts]
    copy_code(folder / "code")
    lines = "".join(json.dumps(words) + "\n" for words in commands)
    (folder / "tasks.jsonl").write_text(lines, encoding="utf-8")
    jobs: list[str] = []
    for part, text in enumerate(texts, start=1):
        script = folder / ("job.sbatch" if part == 1 else f"job-{part}.sbatch")
        script.write_text(text, encoding="utf-8")
        try:
            jobs.append(submit(script))
        except UserError as error:
            before = f"\nsubmitted before it: {', '.join(jobs)}" if jobs else ""
            limit = f"{largest:,}" if largest < sys.maxsize else "not known here"
            reason = f"tasks of an array, by MaxArraySize of scontrol show config: at most {limit}"
            raise UserError(f"{error}\n{reason}{before}") from None
    return ",".join(jobs), folder


def render_array(
    tasks: range, folder: Path, site: Site, *, name: str = "eval", gpus: int = 0, time: str = "", max_parallel: int = 0
) -> str:
    """The sbatch file of an array of `tasks`, lines of tasks.jsonl in `folder` from 0; else as of `submit_array`."""
    here = Path.cwd()
    refuse_control_characters(
        site, {"the array's name": name, "its folder": folder, "the current folder": here, "--time": time}
    )
    at_a_time = f"%{max_parallel}" if max_parallel else ""
    container = f"srun --ntasks=1 {site.container} " if site.container else ""
    number = f"$((SLURM_ARRAY_TASK_ID + {tasks.start}))" if tasks.start else "$SLURM_ARRAY_TASK_ID"
    file = f"{folder}/tasks.jsonl"
    return f"""\
#!/bin/bash
# {name}: {len(tasks)} tasks, one for each line of {file}; written by launch.sbatch.

{directives(site, 1, 1, gpus, name=name, time=time, output=f"{literal(folder)}/%A_%a.out", workdir=here)}
#SBATCH --array=0-{len(tasks) - 1}{at_a_time}
# A task that is preempted starts again.
#SBATCH --requeue
#SBATCH --open-mode=append

{preamble(site, folder / "code")}

exec {container}{python(site)} -m launch.sbatch {shlex.quote(file)} "{number}"
"""


def submit_jobs(commands: list[list[str]], launches: Path, name: str, options: argparse.Namespace) -> tuple[str, Path]:
    """An array with the options of `jobs.add_job_options`, for `jobs.listed_or_submitted`."""
    return submit_array(commands, launches, load_site(options.site)[0], name=name, gpus=options.gpus,
                        time=options.time, max_parallel=options.max_parallel)  # fmt: skip


def max_array_size() -> int:
    """Tasks an array of this cluster may have; no limit where it does not say."""
    try:
        shown = ask("scontrol", "show", "config").stdout
    except OSError:
        return sys.maxsize
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    # It is the first number that no task may have, and 0 forbids arrays: sbatch will say so.
    return max(1, int(match[1])) if match else sys.maxsize


def directives(
    site: Site, nodes: int, ranks: int, gpus: int, *, name: str, time: str, output: str, workdir: Path,
    dependency: str = "",
) -> str:  # fmt: skip
    """The #SBATCH lines that say how much of what, where and for how long; ranks and GPUs are those of a node."""
    asked = {
        "job-name": name,
        "nodes": nodes,
        "ntasks-per-node": 1,
        "gres": site.gres.replace("{gpus}", str(gpus)) if gpus else "",
        "cpus-per-task": ranks * site.cpus_per_rank,
        "mem": site.mem,
        "time": time or site.time,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "output": output,
        # Not a pattern: with %% for % the job would start in /tmp.
        "chdir": workdir,
    }
    options = [f"--{option}={value}" for option, value in asked.items() if value]
    return "\n".join(map(directive, [*options, *site.extra, *([f"--dependency={dependency}"] if dependency else [])]))


def directive(option: str) -> str:
    """A #SBATCH line; sbatch splits it at blanks unless there are quotes.

    Raises:
        ConfigError: a value that would end its quotes.
    """
    name, equals, value = option.partition("=")
    if '"' in value or "\\" in value:
        raise ConfigError(f"{option}: sbatch takes no quotation mark or backslash in a value; choose another name")
    return f'#SBATCH {name}="{value}"' if equals and any(c in value for c in " #'") else f"#SBATCH {option}"


def refuse_control_characters(site: Site, values: dict[str, object]) -> None:
    """Raises ConfigError for a value, or one of the site TOML, that would not stay on its line of the script.

    Args:
        site: whose `setup` alone is not looked at, since its lines are shell themselves.
        values: texts, paths, or lists of them, by the name the user knows them under.
    """
    of_site = {field.name: getattr(site, field.name) for field in fields(site) if field.name != "setup"}
    of_site["env"] = list(site.env.values())
    for name, value in (values | {f"{key} of the site TOML": value for key, value in of_site.items()}).items():
        for text in value if isinstance(value, list) else [value]:
            if hidden := control_characters(str(text)):
                raise ConfigError(f"{name} = {str(text)!r}: holds {hidden}, which a script cannot; choose another")


def preamble(site: Site, code: Path) -> str:
    """The shell's setup: the site's own lines, then our variables; `code` holds this project's packages."""
    variables = {"OMP_NUM_THREADS": str(max(1, min(8, site.cpus_per_rank))), **site.env}
    # Before `set -u`, which the scripts behind `module` and `conda` do not bear.
    setup = ["set -e", "# From the site TOML:", *site.setup] if site.setup else []
    return "\n".join([
        *setup,
        "set -euo pipefail",
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        # Without it the current folder, which may be the checkout, would come first.
        "export PYTHONSAFEPATH=1",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
    ])  # fmt: skip


def python(site: Site) -> str:
    """The interpreter: the one that is running, or whichever the site's own lines put on the PATH."""
    return "python" if site.setup or site.container else shlex.quote(sys.executable)


def literal(path: str | Path) -> str:
    """A path in an option of sbatch that knows % patterns, as --output does."""
    return str(path).replace("%", "%%")


def next_folder(launches: Path) -> Path:
    """The folder that the next launch will get, of those in a folder of launches: 001, 002, ..."""
    taken = [int(path.name) for path in launches.glob("[0-9]*") if path.name.isdecimal()]
    return launches / f"{max(taken, default=0) + 1:03d}"


def new_folder(launches: Path) -> Path:
    """Makes the folder of a launch; two launches at once get two."""
    while True:
        folder = next_folder(launches)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be made: {error.strerror}; choose another job.dump_folder or --out"
            ) from None


def copy_code(folder: Path) -> None:
    """Copies this project's packages, with changes that are not committed, and notes the revision."""
    for name in PACKAGES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (folder / REVISION).write_text(versions().get("git", "") + "\n", encoding="utf-8")


def require_sbatch() -> None:
    """Raises UserError where there is no SLURM, before anything is written."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch on this machine, so nothing was submitted\n"
            "--dry-run prints the job; bash launch/local.sh trains here"
        )


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command and keeps what it prints, in whatever encoding."""
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")


def submit(script: Path) -> str:
    """Hands a file to sbatch and returns the job id; raises UserError if sbatch refused it."""
    done = ask("sbatch", "--parsable", str(script))
    if done.returncode:
        raise UserError(f"sbatch refused {script}:\n{done.stderr.strip() or done.stdout.strip()}")
    # Some sites print a banner before the answer, `519605` or `519605;cluster`.
    answers = re.findall(r"^(\d+)(?:;\S+)?\s*$", done.stdout, re.MULTILINE)
    if not answers:
        raise UserError(
            f"sbatch took {script}, but its answer names no job: {done.stdout.strip()[-200:]!r}\n"
            "look for it with squeue --me"
        )
    return answers[-1]


def main(arguments: list[str] | None = None) -> int:
    """Runs one task of an array."""
    words = sys.argv[1:] if arguments is None else arguments
    if len(words) != 2 or not words[1].isdecimal():
        raise ConfigError("usage: python -m launch.sbatch TASKS.jsonl NUMBER")
    tasks, number = read_tasks(Path(words[0])), int(words[1])
    if number >= len(tasks):
        raise ConfigError(f"task {number}: {words[0]} has tasks 0 to {len(tasks) - 1}")
    label, command = f"task {number} of 0-{len(tasks) - 1}", tasks[number]
    print(f"{label}: {shlex.join(command)}", flush=True)
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}") from None
    numbers = signal.SIGTERM, signal.SIGUSR1
    previous = [signal.signal(number, lambda received, frame: process.send_signal(received)) for number in numbers]
    try:
        code = process.wait()
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
    if code:
        ending = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        print(f"{label} failed with {ending}: {shlex.join(command)}", file=sys.stderr, flush=True)
    return code if code >= 0 else 128 - code


def read_tasks(path: Path) -> list[list[str]]:
    """The commands in a tasks.jsonl; raises UserError."""
    try:
        tasks = [json.loads(line) for line in read_text(path).splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a list of tasks: {error}") from None
    for number, task in enumerate(tasks, start=1):
        if not isinstance(task, list) or not task or not all(isinstance(word, str) for word in task):
            raise UserError(f'{path}:{number}: expected a list of words, such as ["python", "-m", "eval.x"]')
    return tasks


if __name__ == "__main__":
    exit_on_user_error(main)

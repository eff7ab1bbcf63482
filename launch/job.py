"""The sbatch file of a training job: a function of the job and of the site, meant to be read.

    text = render(TrainingJob(...), site)

In the job, one torchrun a node finds the others at the first node, hands signals on to its ranks and waits for them to
save; then `launch.requeue` decides whether the job goes back into the queue.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from .node import TRAIN, Layout
from .sbatch import directive, literal, of_site, preamble, python, refuse_control_characters, resources
from .site import Site


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
    """The sbatch file; see tests/launch/job.sbatch for one.

    Raises:
        ConfigError: a value that would not stay on its line.
    """
    refuse_control_characters({
        # Folders after those they lie in: the first that holds one is to blame.
        "the TOML's name": job.config.name, "an override": job.overrides, "the current folder": job.workdir,
        "job.dump_folder": job.run, "the launch's folder": job.folder, "the code's folder": job.code,
        "--job-name": job.name, "--time": job.time, "--dependency": job.dependency, **of_site(site),
    })  # fmt: skip
    meeting = [rendezvous(site)] if job.nodes > 1 else []
    parts = [head(job, site), preamble(site, job.code), TIME_LEFT, *meeting, train(job, site), requeue(job, site)]
    return "\n\n".join(parts) + "\n"


def head(job: TrainingJob, site: Site) -> str:
    """What it is, how to stop it, and what SLURM is asked for."""
    asked = resources(
        site, name=job.name, nodes=job.nodes, ranks=job.ranks_per_node, gpus=job.gpus_per_node, time=job.time,
        output=f"{literal(job.folder)}/%j.out", workdir=job.workdir,
    )  # fmt: skip
    if job.dependency:
        asked.append(directive(f"--dependency={job.dependency}"))
    directives = "\n".join(asked)
    return f"""\
#!/bin/bash
# {job.name} on {job.size}, written by python -m launch.slurm.
#
#   scancel --signal=USR1 JOB     save and requeue, as before the time limit (at most {job.max_requeues} times)
#   scancel --signal=INT JOB      save and end
#   scancel JOB                   end; the ranks have KillWait (scontrol show config) to save

{directives}
# Requeued, the job keeps its id and goes on in the same output file.
#SBATCH --requeue
#SBATCH --open-mode=append
# The ranks are told to save so many seconds before the time limit; SLURM may do it up to 60 s earlier.
#SBATCH --signal=USR1@{site.signal_seconds}"""


TIME_LEFT = """\
# The ranks want to know when their time is over; SLURM 22.05 does not tell.
end="$(SLURM_TIME_FORMAT=standard squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e || true)"
if [[ "$end" == *T* ]]; then
  SLURM_JOB_END_TIME="$(date --date="$end" +%s)"
  export SLURM_JOB_END_TIME
fi"""


def rendezvous(site: Site) -> str:
    """Where the nodes meet."""
    listed = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)'
    first = shlex.quote(site.rdzv_host) if site.rdzv_host else listed
    return f"""\
# The nodes meet at the first of them, on a port of this job's own, under a name that nobody can guess.
first={first}
endpoint="$first:$((20000 + SLURM_JOB_ID % 10000))"
meeting="$(od -An -N16 -tx8 /dev/urandom | tr -d ' \\n')\""""


def train(job: TrainingJob, site: Site) -> str:
    """One torchrun a node, and what came of it."""
    meeting = ('"$endpoint"', '"$meeting"') if job.nodes > 1 else ("", "")
    layout = Layout(job.nodes, job.ranks_per_node, job.max_restarts, *meeting)
    # A tenth of the time that is left is kept for the decision below.
    seconds = max(1, site.signal_seconds * 9 // 10)
    # srun does not take this over from sbatch since SLURM 22.05.
    cores = f" --cpus-per-task={job.ranks_per_node * site.cpus_per_rank}" if site.cpus_per_rank else ""
    words = layout.torchrun_arguments()
    lines = [
        f"srun --ntasks-per-node=1{cores} --kill-on-bad-exit=0 --wait={seconds}",
        *([f"  {site.container}"] if site.container else []),
        f"  {python(site)} -m launch.torchrun",
        f"    {' '.join(words[:3])}",
        *([f"    {' '.join(words[3:])}"] if words[3:] else []),
        f"    -m {TRAIN}",
        f"    --job.config_file {shlex.quote(str(job.config))}",
        *(f"    {line}" for line in override_lines(job.overrides)),
    ]
    command = " \\\n".join(lines)
    return f"""\
echo "$(date '+%F %T') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, requeued ${{SLURM_RESTART_COUNT:-0}} times"
start="$(date +%s.%N)"
code=0
# SIGTERM to this script: SLURM ends the job (cancelled, preempted, out of time). It stays until the ranks are done.
ended_by_slurm=no
trap 'ended_by_slurm=yes' TERM

# One torchrun a node. It gives the ranks SHUTDOWN_TIMEOUT seconds to save after a signal, and a node that is done
# leaves the others as long (--wait) instead of killing them.
export SHUTDOWN_TIMEOUT={seconds}
{command} || code=$?
trap - TERM"""


def override_lines(overrides: list[str]) -> list[str]:
    """One override a line."""
    lines: list[str] = []
    for word in overrides:
        if word.startswith("--") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += " " + shlex.quote(word)
    return lines


def requeue(job: TrainingJob, site: Site) -> str:
    """The end of the script: back into the queue, or not."""
    # In the container as well: outside it there may be no Python of ours.
    task = f"srun --nodes=1 --ntasks=1 {site.container} " if site.container else ""
    return f"""\
# Requeue? launch/requeue.py says what is and what is not; the answer is kept in launch/requeues.log of the run folder.
verdict=0
{task}{python(site)} -m launch.requeue {shlex.quote(str(job.run))} --max {job.max_requeues} \\
  --code "$code" --since "$start" --ended-by-slurm "$ended_by_slurm" || verdict=$?
if [ "$verdict" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$verdict\""""

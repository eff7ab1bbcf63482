"""Trains on a SLURM cluster: writes one readable sbatch file, records what it will run, submits it.

    python -m launch.slurm train_configs/X.toml --nodes 2 --gpus-per-node 8 --dry-run          print it only
    python -m launch.slurm train_configs/X.toml --nodes 2 --gpus-per-node 8 [--section.key value ...]

What the cluster wants to hear (partition, account, modules) stands in a site TOML, see launch/site_example.toml. The
job saves and requeues itself when it is preempted or out of time, see launch/requeue.py:

    scancel --signal=USR1 JOB      save and requeue
    scancel --signal=INT JOB       save and end
    scancel JOB                    end; the ranks have the cluster's KillWait (often 30 s) to save

A launch leaves in the run folder what it takes to tell later what ran, RUN/launch/001, 002, ...:

    x.toml          the TOML as it was; the job reads this copy, so that editing the original changes nothing queued
    code/           the packages of this project as they were; the job runs this copy, for the same reason
    overrides.json  the command line's settings
    git.txt         revision and changed files; git.diff: what the changes are
    packages.txt    every installed package, as pip freeze lists them
    env.json        who, where, when, with which versions
"""

import argparse
import getpass
import os
import platform
import shlex
import shutil
import socket
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path

from torchtitan_deltaproduct.arguments import Parser, at_least
from torchtitan_deltaproduct.config import Environment, load_config
from torchtitan_deltaproduct.config.snapshots import versions
from torchtitan_deltaproduct.data.check import check_data
from torchtitan_deltaproduct.errors import ConfigError, DataError, UserError, exit_on_user_error
from torchtitan_deltaproduct.files import write_json

from .sbatch import ROOT, TrainingJob, ask, copy_code, new_folder, next_folder, render, require_sbatch, submit
from .site import Site, load_site, seconds_of


def main(arguments: list[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    options, overrides = parse(words)
    site, site_file = load_site(options.site)
    # A file that is wrong on any number of ranks is told of before that is asked for.
    load_config(["--job.config_file", options.config, *overrides], Environment())
    gpus, ranks = per_node(options, site)
    check_time(options.time or site.time, site)
    config = load_config(
        ["--job.config_file", options.config, *overrides],
        Environment(options.nodes * ranks, cuda=True if gpus else None, files=True),
    )
    try:
        check_data(config)
    except DataError as error:
        # Data may live where only the nodes can see it.
        print(f"warning: {str(error).splitlines()[0]} (seen from this machine)", file=sys.stderr)
    run, toml = Path(config.job.dump_folder).absolute(), Path(options.config)

    def job_in(folder: Path) -> TrainingJob:
        return TrainingJob(
            folder / toml.name, overrides, run, folder, Path.cwd(), folder / "code" if options.snapshot else ROOT,
            options.nodes, ranks, gpus, options.job_name or toml.stem, options.time, options.dependency,
            options.max_requeues, options.max_restarts,
        )  # fmt: skip

    job = job_in(next_folder(run / "launch"))
    text = render(job, site)
    if not options.dry_run:
        require_sbatch()
        if not options.dependency:
            refuse_second_job(run)
        job = job_in(new_folder(run / "launch"))
        text = render(job, site)
        record(job.folder, toml, overrides, ["python", "-m", "launch.slurm", *words])
    shown = site_file or "none, so the cluster's defaults; see launch/site_example.toml"
    print(f"site TOML: {shown}", file=sys.stderr)
    origin = "a copy, made now" if options.snapshot else "the checkout, as it is when the job starts"
    print(f"code: {job.code} ({origin}), revision {versions().get('git', 'unknown')}", file=sys.stderr)
    if options.dry_run:
        print(text, end="")
        return
    script = job.folder / "job.sbatch"
    script.write_text(text, encoding="utf-8")
    number = submit(script)
    (job.folder / "job_id").write_text(number + "\n", encoding="utf-8")
    # tail -f wants a file; the job appends to it.
    output = job.folder / f"{number}.out"
    output.touch()
    print(f"submitted job {number} on {job.size}: {script}\ntail -f {shlex.quote(str(output))}")


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser("launch.slurm", __doc__.partition("\nA launch leaves")[0], in_full=True, allow_abbrev=False)
    add = parser.add_argument
    number = partial(add, metavar="N")
    add("config", metavar="TOML", help="what to train")
    number("--nodes", type=at_least(1), default=1, help="(default: 1)")
    number("--gpus-per-node", type=at_least(1), default=0, help="GPUs, and so ranks, of a node (default: the site's)")
    number("--ranks-per-node", type=at_least(1), default=0, help="ranks of a node without asking SLURM for GPUs")
    add("--time", default="", help="time limit, such as 24:00:00 (default: the site's)")
    add("--site", help="site TOML (default: the first that launch/site.py finds)")
    number("--max-requeues", type=at_least(0), default=10, help="requeues in all (default: %(default)s)")
    number("--max-restarts", type=at_least(0), default=3, help="restarts of dead ranks (default: %(default)s)")
    add("--job-name", default="", help="(default: the TOML's name)")
    add("--dependency", default="", help="as sbatch takes it, such as afterany:123")
    add("--snapshot", action=argparse.BooleanOptionalAction, default=True,
        help="run a copy of the code, kept in the launch's folder, and not the checkout")  # fmt: skip
    add("--dry-run", action="store_true", help="print the sbatch file and write nothing")
    return parser.parse_with_overrides(words)


def per_node(options: argparse.Namespace, site: Site) -> tuple[int, int]:
    """GPUs and ranks of a node."""
    if options.gpus_per_node and options.ranks_per_node:
        raise ConfigError("say --gpus-per-node, one rank a GPU, or --ranks-per-node, for nodes without GPUs; not both")
    gpus = 0 if options.ranks_per_node else options.gpus_per_node or site.gpus_per_node
    if not gpus and not options.ranks_per_node:
        raise ConfigError("how many ranks? Say --gpus-per-node or --ranks-per-node, or gpus_per_node in the site TOML")
    return gpus, options.ranks_per_node or gpus


def check_time(limit: str, site: Site) -> None:
    """Refuses a time limit that would be over as soon as the job has started."""
    if not limit:
        return
    try:
        seconds = seconds_of(limit)
    except ValueError as reason:
        raise ConfigError(f"--time {limit}: {reason}") from None
    if seconds < 2 * site.signal_seconds:
        raise ConfigError(
            f"time limit {limit}: the ranks are told to save {site.signal_seconds} s before it (signal_seconds of the "
            "site TOML), which must be at most half of it"
        )


def refuse_second_job(run: Path) -> None:
    """Two jobs in one run folder would overwrite each other's checkpoints.

    Raises:
        UserError: a job of an earlier launch is queued or running.
    """
    noted = [path.read_text(encoding="utf-8", errors="replace").strip() for path in sorted(run.glob("launch/*/job_id"))]
    jobs = [job for job in noted if job.isdecimal()]
    listed = ["squeue", "--noheader", "--jobs", ",".join(jobs), "--format=%i %T"]
    alive = ask(*listed).stdout.split("\n")[0].split() if jobs else []
    if alive:
        raise UserError(
            f"job {alive[0]} is {alive[1]} in {run} already\n"
            f"scancel {alive[0]}, or start after it with --dependency afterany:{alive[0]}"
        )


def record(folder: Path, config: Path, overrides: list[str], command: list[str]) -> None:
    """Writes the files listed above to the folder of a launch; `command` is what the user typed."""
    shutil.copyfile(config, folder / config.name)
    copy_code(folder / "code")
    write_json(folder / "overrides.json", overrides)
    write_json(folder / "env.json", {
        "command": shlex.join(command), "folder": str(Path.cwd()), "host": socket.gethostname(), "user": user(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "platform": platform.platform(), "python": sys.executable,
        "versions": versions(),
    })  # fmt: skip
    packages = {f"{package.metadata['Name']}=={package.version}" for package in metadata.distributions()}
    texts = {
        "packages.txt": "".join(f"{line}\n" for line in sorted(packages, key=str.lower)),
        "git.txt": git("log", "-1", "--format=%H %cI %s") + git("status", "--short"),
        "git.diff": git("diff", "HEAD"),
    }
    for name, text in texts.items():
        if text or name != "git.diff":
            (folder / name).write_text(text, encoding="utf-8")


def user() -> str:
    """The user's name, or number where none is known: in a container, say."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def git(*command: str) -> str:
    """What git prints about this checkout; "" where it is none, or there is no git."""
    try:
        done = ask("git", "-C", str(ROOT), *command)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    exit_on_user_error(main)

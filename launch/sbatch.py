"""What every sbatch file of ours has in common, and handing one to SLURM.

    lines = resources(site, name="x", nodes=2, ...)        # ["#SBATCH --job-name=x", ...]
    job = submit(folder / "job.sbatch")                # "12345"
"""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from torchtitan_deltaproduct.errors import ConfigError, UserError
from torchtitan_deltaproduct.files import control_characters

from .site import Site

ROOT = Path(__file__).resolve().parents[1]


def resources(
    site: Site, *, name: str, nodes: int, ranks: int, gpus: int, time: str, output: str, workdir: Path
) -> list[str]:
    """The #SBATCH lines that say how much of what, where and for how long.

    Args:
        site: what the cluster wants to hear.
        name: the job's name.
        nodes: how many.
        ranks: processes that compute on each of them.
        gpus: GPUs on each of them.
        time: the limit; empty: the site's.
        output: file of everything the job prints, sbatch's % patterns included.
        workdir: where the job starts.
    """
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
    lines = [directive(f"--{option}={value}") for option, value in asked.items() if value]
    return lines + [directive(option) for option in site.extra]


def directive(option: str) -> str:
    """A #SBATCH line; sbatch splits it at blanks unless there are quotes.

    Raises:
        ConfigError: a value that would end its quotes.
    """
    name, equals, value = option.partition("=")
    if '"' in value or "\\" in value:
        raise ConfigError(f"{option}: sbatch takes no quotation mark or backslash in a value; choose another name")
    return f'#SBATCH {name}="{value}"' if equals and any(c in value for c in " #'") else f"#SBATCH {option}"


def refuse_control_characters(values: dict[str, object]) -> None:
    """Raises ConfigError for a value that would not stay on its line of the script.

    Args:
        values: what is to be rendered: texts, paths, or lists of them, by the name the user knows it under.
    """
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if hidden := control_characters(str(text)):
                raise ConfigError(f"{name} = {str(text)!r}: holds {hidden}, which a script cannot; choose another")


def of_site(site: Site) -> dict[str, object]:
    """The values of the site TOML that go into a script, by name; not `setup`, whose lines are shell themselves."""
    taken = {f"{field.name} of the site TOML": getattr(site, field.name) for field in fields(site)}
    del taken["setup of the site TOML"]
    return taken | {"env of the site TOML": list(site.env.values())}


def preamble(site: Site, code: Path) -> str:
    """The shell's setup: the site's own lines, then our variables.

    Args:
        site: what the cluster wants to hear.
        code: folder that holds this project's packages.
    """
    threads = max(1, min(8, site.cpus_per_rank))
    variables = {"OMP_NUM_THREADS": str(threads), **site.env}
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


def require_sbatch() -> None:
    """Raises UserError where there is no SLURM, before anything is written."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch on this machine, so nothing was submitted\n"
            "--dry-run prints the job; bash launch/local.sh trains here"
        )


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command and keeps what it says, in whatever encoding."""
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")


def submit(script: Path) -> str:
    """Hands a file to sbatch.

    Returns:
        The job id.

    Raises:
        UserError: sbatch refused it.
    """
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

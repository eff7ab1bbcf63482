"""The site TOML: what a cluster wants to hear in every job, so that no one edits scripts (see site_example.toml).

    site, path = load_site(None)
    site.partition                         # "gpu"

Looked for in this order: --site, $DELTAPRODUCT_SITE, ./site.toml, ~/.config/torchtitan-deltaproduct/site.toml. Strict,
as the training TOML is: an unknown key or a value of the wrong type is an error with its line and the remedy.
"""

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from torchtitan_deltaproduct.arguments import path as path_of
from torchtitan_deltaproduct.config.locate import read_toml
from torchtitan_deltaproduct.config.problems import Problem, Source, raise_if_any
from torchtitan_deltaproduct.config.values import conform
from torchtitan_deltaproduct.errors import ConfigError, nearest
from torchtitan_deltaproduct.files import control_characters

VARIABLE = "DELTAPRODUCT_SITE"
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class Site:
    """Everything a job needs to say to SLURM beyond nodes and ranks; empty or 0 leaves it to SLURM's defaults."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    time: str = ""
    """Time limit, as sbatch spells it: `24:00:00`, `2-00:00:00`, or minutes."""
    gpus_per_node: int = 0
    """GPUs, and so ranks, of a node; `--gpus-per-node` and `--ranks-per-node` go first."""
    gres: str = "gpu:{gpus}"
    """How this cluster spells GPUs, `{gpus}` standing for their number."""
    cpus_per_rank: int = 0
    """Cores of a rank. SLURM's own default is one core for all ranks of a node together."""
    mem: str = ""
    """Memory on each node, such as `200G`; `0` is all of it."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before anything else: `module load cuda`, `source /shared/venv/bin/activate`."""
    container: str = ""
    """Words in front of `python` in each task, such as `apptainer exec --nv image.sif`, or options of srun."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables of every rank."""
    rdzv_host: str = ""
    """Address of the job's first node, where its name is not one."""
    signal_seconds: int = 300
    """Seconds before the time limit at which the ranks are told to save; enough for a step and a checkpoint."""
    extra: list[str] = field(default_factory=list)
    """Further options of sbatch, such as `--reservation=name`."""


def load_site(given: str | None) -> tuple[Site, Path | None]:
    """Reads the site TOML: the given one, or the first found where the module docstring says.

    Returns:
        The site and the file it is from; defaults and None where there is no file.

    Raises:
        ConfigError: all that is wrong with the file.
    """
    named = path_of(given or os.environ.get(VARIABLE) or "")
    if named and not Path(named).is_file():
        asked = "--site " if given else f"{VARIABLE}="
        raise ConfigError(f"{asked}{named}: no such file; launch/site_example.toml shows one")
    usual = [Path("site.toml"), Path(path_of("~/.config/torchtitan-deltaproduct/site.toml"))]
    path = Path(named) if named else next((path for path in usual if path.is_file()), None)
    return (Site(), None) if path is None else (read_site(path), path)


def read_site(path: Path) -> Site:
    """Reads one site TOML; raises ConfigError."""
    tree, lines = read_toml(path, "a site, such as launch/site_example.toml")
    hints = get_type_hints(Site)
    values, problems = {}, []
    for name, value in tree.items():
        source = Source(str(path), lines.get((name,), 1))
        label = source.label(name, value)
        if name not in hints:
            guess = nearest(name, hints)
            hint = f"nearest: '{guess}'" if guess else f"there are: {', '.join(hints)}"
            problems.append(Problem(f"{label}: no such key; {hint}", source))
            continue
        try:
            values[name] = conform_table(value) if hints[name] == dict[str, str] else conform(value, hints[name])
            if reason := JUDGES.get(name, lambda value: "")(values[name]):
                raise ValueError(reason)
        except ValueError as reason:
            problems.append(Problem(f"{label}: {reason}", source))
    raise_if_any(problems)
    return Site(**values)


def conform_table(value: Any) -> dict[str, str]:
    """A table of environment variables."""
    if not isinstance(value, dict):
        raise ValueError('expected a table, such as env = {NCCL_DEBUG = "WARN"}')
    for name, text in value.items():
        if not isinstance(text, str):
            raise ValueError(f'{name}: expected a string; write {name} = "{text}"')
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"{name}: not the name of an environment variable")
    return value


def seconds_of(time: str) -> int:
    """A time limit of sbatch in seconds: minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s.

    Raises:
        ValueError: it is none of these.
    """
    match = TIME.fullmatch(time)
    if match is None:
        raise ValueError("expected a time as sbatch takes it: hours:minutes:seconds, days-hours or minutes")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return 86400 * int(match["days"]) + 3600 * hours + 60 * minutes + seconds
    hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return 3600 * hours + 60 * minutes + seconds


def one_line(value: str) -> str:
    hidden = control_characters(value)
    return f"must be one line, without {hidden}" if hidden else ""


def judge_time(limit: str) -> str:
    if limit:
        seconds_of(limit)
    return ""


def judge_gres(gres: str) -> str:
    return one_line(gres) if not gres or "{gpus}" in gres else "must contain {gpus}, which stands for their number"


def judge_container(words: str) -> str:
    shlex.split(words)
    return one_line(words)


OWNED = {option: owner for options, owner in {
    "nodes N": "--nodes",
    "ntasks n ntasks-per-node tasks-per-node": "--ranks-per-node and --gpus-per-node",
    "output o error e nodefile F open-mode chdir D signal requeue no-requeue array a wrap parsable test-only wait W":
        "no other way: the launcher counts on its own",
    "job-name J": "--job-name",
    "dependency d": "--dependency",
    "cpus-per-task c": 'the key "cpus_per_rank"',
    "gres gpus G gpus-per-node gpus-per-task ntasks-per-gpu": 'the keys "gpus_per_node" and "gres"',
    "time t": 'the key "time"', "mem": 'the key "mem"', "partition p": 'the key "partition"',
    "account A": 'the key "account"', "qos q": 'the key "qos"', "constraint C": 'the key "constraint"',
}.items() for option in options.split()}  # fmt: skip
"""Options of sbatch -> what sets them. Repeated in `extra` they would win over it, and the job would not know."""
WITHOUT_VALUE = "HIOQVhksv"
"""Letters of sbatch that take no value."""


def judge_extra(value: list[str]) -> str:
    for line in value:
        if not re.fullmatch(r"-\S.*", line) or control_characters(line):
            return f'{line!r}: expected an option of sbatch, such as "--reservation=name"'
        # Without "=" further words may be options too.
        for word in [line.partition("=")[0]] if "=" in line.split()[0] else line.split():
            if word.startswith("-") and (owner := owned(word)):
                return f'"{line}": is said elsewhere; use {owner}'
    return ""


def owned(word: str) -> str:
    """What sets this option of sbatch, so that `extra` must not; "" for an option that may stand in `extra`."""
    if not word.startswith("--"):
        # -HN4 is -H and -N4: every letter counts up to the first that takes the rest as its value.
        return OWNED.get(word[1:].lstrip(WITHOUT_VALUE)[:1], "")
    name = word[2:].partition("=")[0]
    # sbatch takes the beginning of an option for the option.
    begun = (owner for option, owner in OWNED.items() if len(option) > 1 and name and option.startswith(name))
    return OWNED.get(name) or next(begun, "")


JUDGES: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("partition", "account", "qos", "constraint", "mem", "rdzv_host"), one_line),
    **dict.fromkeys(("gpus_per_node", "cpus_per_rank"), lambda count: "must not be negative" if count < 0 else ""),
    "time": judge_time,
    "gres": judge_gres,
    "container": judge_container,
    "signal_seconds": lambda s: "" if 1 <= s <= 65535 else "must be 1 to 65535, the range of sbatch --signal",
    "extra": judge_extra,
}
"""Key -> what is wrong with a value of the right type: "" for nothing, or a ValueError's reason."""

"""Loads a job: the TOML named by `--job.config_file`, then the command line on top, strictly.

Every problem of the file and of the command line is collected, each with its line and the nearest valid name,
and raised as one `ConfigError`, before any process group starts. `--help` prints the tables, `--help
training` those of a table.

    config = load_config(["--job.config_file", "train_configs/x.toml", "--training.steps", "10"])
    config = load_config(["train_configs/x.toml", "--training.steps", "10"])                          # the same
    config.provenance["optimizer.lr"]     # "train_configs/x.toml:31", "command line" or "default (ours)"
"""

import glob
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import nearest
from ..files import read_text
from ..options import value_of
from .check import Environment, check
from .job import JobConfig
from .locate import Path, locate
from .problems import Problem, Source, quoted, raise_if_any
from .reference import asks_for_help, print_help
from .schedule import Schedule
from .schema import describe_key, describe_option, describe_table, schema, set_value, suggest_key, tables
from .values import conform, parse_text

MOST_NAMED = 4
"""TOML files that a message lists."""


def load_config(argv: list[str], environment: Environment | None = None) -> JobConfig:
    """Builds the job config of a command line.

    Args:
        argv: Arguments without the program name: `--job.config_file X.toml`, or `X.toml` in front, and overrides.
        environment: Machine the config is to run on; by default this one. `Environment()` checks only what
            holds on every machine, for example to look at a cluster's config on a laptop.

    Returns:
        The config; its attribute `provenance` maps every key to the place its value comes from.

    Raises:
        ConfigError: All that is wrong with the file and the options, one line each.
        SystemExit: With code 0, after printing the help that `--help` asked for.
    """
    if asks_for_help(argv):
        print_help(argv)
        raise SystemExit(0)
    in_front = bool(argv) and not argv[0].startswith("-")
    overrides, problems = parse_overrides(["--job.config_file", *argv] if in_front else argv)
    file = overrides.get("job.config_file")
    if not file:
        problems.insert(0, Problem("--job.config_file FILE is missing" + _files_found()))
        raise_if_any(problems)
    in_file = _values_of_file(file, _read(file, problems))
    problems = [*in_file.problems, *problems]
    sources = {key: Source(file, line) for key, line in in_file.lines.items()}
    config = JobConfig()
    for key, value in in_file.values.items():
        set_value(config, key, value)
    for key, value in overrides.items():
        set_value(config, key, value)
        sources[key] = Source()
    config.provenance = {
        key: str(sources.get(key, f"default ({'ours' if option.ours else 'torchtitan'})"))
        for key, option in schema().items()
    }
    shorten_warmup(config, in_file.values, overrides)
    expand_home(config)
    problems += check(config, sources, environment or Environment.detect(), unusable=in_file.unusable)
    raise_if_any(problems)
    return config


def shorten_warmup(config: JobConfig, in_file: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Shortens the warm-up of a file's run with the run, where a command line cuts that short; `provenance` says so."""
    schedule, steps = config.lr_scheduler, config.training.steps
    asked = overrides.keys() & {"training.steps", "lr_scheduler.warmup_steps", "lr_scheduler.total_steps"}
    before = in_file.get("training.steps", JobConfig().training.steps)
    if asked != {"training.steps"} or schedule.total_steps is not None or not 1 <= steps < before:
        return
    if Schedule.of(schedule, steps).fits:
        return
    config.warmup_in_file = warmup = schedule.warmup_steps
    schedule.warmup_steps = max(1, warmup * steps // before)
    note = f"shortened from {warmup} to {schedule.warmup_steps}, as training.steps from {before} to {steps}"
    config.provenance["lr_scheduler.warmup_steps"] = note


def expand_home(config: JobConfig) -> None:
    """Replaces `~` in every path of a config, which no shell has done for a TOML."""
    for key in (key for key, option in schema().items() if option.record.is_path):
        value = value_of(config, key)
        if isinstance(value, list):
            set_value(config, key, [os.path.expanduser(path) for path in value])
        elif value:
            set_value(config, key, os.path.expanduser(value))


def parse_overrides(argv: list[str]) -> tuple[dict[str, Any], list[Problem]]:
    """Reads `--section.key value` or `=value`, `--section.flag`, `--section.no-flag`.

    Dashes and underscores are the same; a list is comma separated or a TOML literal; `none` unsets an optional option;
    of an option given twice the later one holds, so that a launcher can append.

    Returns:
        Values by dotted key, checked against the types of the fields, and what was wrong with the rest.
    """
    given: dict[str, Any] = {}
    problems: list[Problem] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            problems.append(Problem(f"{word}: not an option; overrides are --section.key value"))
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        has_value = bool(equals) or bool(words and not words[0].startswith("--"))
        key, negated = _resolve(name)
        if key is None:
            text = text if equals else words.pop(0) if has_value else ""
            problems.append(Problem(_unknown(word.partition("=")[0], name, text)))
            continue
        if negated or (schema()[key].hint is bool and not has_value):
            if negated and equals:
                problems.append(Problem(f"{word}: a flag with 'no' takes no value; write --{key} false"))
            given[key] = not negated
            continue
        if not has_value:
            problems.append(Problem(f"--{key}: needs a value{quoted(schema()[key].summary)}"))
            continue
        text = text if equals else words.pop(0)
        try:
            whole = schema()[key].record.is_prose and not text.lstrip().startswith("[")
            value = [text] if whole else parse_text(text, schema()[key].hint)
            given[key] = conform(value, schema()[key].hint)
        except ValueError as reason:
            problems.append(Problem(f"--{key} {text}: {reason}{quoted(schema()[key].summary)}"))
    return given, problems


def _resolve(name: str) -> tuple[str | None, bool]:
    """The key an option names, and whether it is the `no` form of a flag; (None, False) if unknown."""
    if name in schema():
        return name, False
    table, _, leaf = name.rpartition(".")
    positive = f"{table}.{leaf.removeprefix('no_')}"
    if leaf.startswith("no_") and positive in schema() and schema()[positive].hint is bool:
        return positive, True
    return None, False


def _unknown(option: str, name: str, text: str) -> str:
    written = f"{option} {text}".rstrip()
    if name in tables():
        return f"{written}: a table; set one of its options, --{name}.{(tables()[name] or ('',))[0]} ..."
    return f"{written}: no such option; {describe_option(name)}"


@dataclass
class _Given:
    """What a TOML says, sorted out."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unusable: set[str] = field(default_factory=set)
    """Keys that were given a value of the wrong type: checks that look at them would only confuse."""


def _values_of_file(file: str, text: str) -> _Given:
    given = _Given()
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        given.problems.append(_syntax_problem(file, text, error))
        given.unusable.update(schema())
        return given
    lines = locate(text)
    for path, value in _leaves(tree, ()):
        source = Source(file, lines.get(path, 1))
        key = ".".join(path)
        option = schema().get(key)
        if option is None or isinstance(value, dict) or key == "job.config_file":
            given.problems.append(Problem(_misplaced(path, value, source), source))
            continue
        try:
            given.values[key] = conform(value, option.hint)
            given.lines[key] = source.line
        except ValueError as reason:
            wrong = f"{source.label(key, value)}: {reason}{quoted(option.summary)}"
            given.problems.append(Problem(wrong, _element_source(source, lines, path, str(reason))))
            given.unusable.add(key)
    return given


def _leaves(tree: dict[str, Any], path: Path) -> Any:
    """Yields (path, value) of every option and of every table that should not be there."""
    for name, value in tree.items():
        here = (*path, name)
        if isinstance(value, dict) and ".".join(here) in tables():
            yield from _leaves(value, here)
        else:
            yield here, value


def _misplaced(path: tuple[str, ...], value: Any, source: Source) -> str:
    """Says what is wrong with a key that no option has."""
    *tables_above, name = path
    key, table = ".".join(path), ".".join(tables_above)
    if key == "job.config_file":
        return f"{source.label(key, value)}: belongs on the command line"
    if key in schema():
        return f"[{key}]: an option, not a table{quoted(schema()[key].summary)}"
    is_table = isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict))
    if key in tables():
        return f"{source.label(key, value)}: a table, not an option; write [{key}]"
    if is_table:
        return f"[{key}]: no such table; {describe_table(key)}"
    if not table:
        guesses = suggest_key("", name)
        remedy = describe_key("", name) if guesses else "options stand in tables: see --help"
        return f"{source.label(key, value)}: stands in no table; {remedy}"
    return f"{source.label(key, value)}: no such key; {describe_key(table, name)}"


def _element_source(source: Source, lines: dict[Path, int], path: Path, reason: str) -> Source:
    """The line of the list element that `reason` speaks of, where it speaks of one."""
    match = re.match(r"element (\d+)", reason)
    return Source(source.file, lines.get((*path, int(match[1]) - 1), source.line)) if match else source


def _syntax_problem(file: str, text: str, error: tomllib.TOMLDecodeError) -> Problem:
    match = re.search(r"^(.*) \(at (?:line (\d+), column (\d+)|end of document)\)$", str(error), re.DOTALL)
    reason, line = (match[1], match[2]) if match else (str(error), None)
    lines = text.splitlines() or [""]
    number = min(int(line), len(lines)) if line else len(lines)
    content = lines[number - 1].strip()
    word = re.search(r"=\s*(True|False|None|yes|no|[A-Za-z_./][\w./-]*)\s*(#.*)?$", content)
    remedy = ""
    if word and word[1] in ("True", "False"):
        remedy = f"; write {word[1].lower()}"
    elif word and word[1] == "None":
        remedy = "; TOML has no None: to leave an option unset, delete the line"
    elif word and reason == "Invalid value":
        remedy = f'; a string needs quotes: "{word[1]}"'
    shown = f" in `{content}`" if content else ""
    return Problem(f"not valid TOML: {reason[:1].lower()}{reason[1:]}{shown}{remedy}", Source(file, number))


def _read(file: str, problems: list[Problem]) -> str:
    try:
        return read_text(os.path.expanduser(file))
    except FileNotFoundError:
        reason = f"no such file{_files_found(file)}"
    except IsADirectoryError:
        reason = f"a folder, not a TOML file{_files_found(file)}"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text (byte {error.start}); TOML files are UTF-8"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    raise_if_any([Problem(f"--job.config_file {file}: {reason}"), *problems])
    raise AssertionError("unreachable")


def _files_found(wanted: str = "") -> str:
    """`; nearest: ...` or `; there are: ...`, of the TOML files in train_configs/, a few of many."""
    files = sorted(glob.glob("train_configs/**/*.toml", recursive=True))
    stems = {os.path.basename(file): file for file in files}
    if wanted and (guess := nearest(os.path.basename(wanted), stems)):
        return f"; nearest: {stems[guess]}"
    if files:
        more = f", and {len(files) - MOST_NAMED} more in train_configs/" if len(files) > MOST_NAMED else ""
        return "; there are: " + ", ".join(files[:MOST_NAMED]) + more
    return f"; train_configs/ under {os.getcwd()} has no TOML files"

"""Command-line overrides: `--section.key value` or `=value`, `--section.flag`, `--section.no-flag`.

Dashes and underscores are the same; a list is comma separated or a TOML literal; `none` unsets an optional
option; of an option given twice the later one holds, so that a launcher can append.

    given, problems = parse_overrides(["--training.steps", "10", "--compile.enable"])
    given    # {"training.steps": 10, "compile.enable": True}
"""

from typing import Any

from .fields import schema, tables
from .names import describe_option
from .problems import Problem, quoted
from .values import conform, parse_text


def parse_overrides(argv: list[str]) -> tuple[dict[str, Any], list[Problem]]:
    """Reads the arguments of a command line.

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
            given[key] = conform(parse_text(text, schema()[key].hint), schema()[key].hint)
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

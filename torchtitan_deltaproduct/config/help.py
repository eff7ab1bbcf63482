"""The text of `--help`: every option a TOML may set, with its type, default and first doc sentence.

    python -m torchtitan_deltaproduct.train --help              all tables
    python -m torchtitan_deltaproduct.train --help training     one table

Options that this toolkit refuses are listed, with the reason, only where one table is asked for.
"""

import os

from .fields import schema, tables, type_name
from .names import describe_table
from .unsupported import refusal, supported_keys
from .values import show

_USAGE = """\
usage: --job.config_file FILE [--section.key VALUE | --section.flag | --section.no-flag] ...
       --help [section]

Options of the TOML tables; every one can be overridden on the command line."""


def asks_for_help(argv: list[str]) -> bool:
    return "--help" in argv or "-h" in argv


def print_help(argv: list[str]) -> None:
    """Prints the help that `argv` asks for, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        position = argv.index("--help" if "--help" in argv else "-h")
        print(render_help("".join(argv[position + 1 : position + 2]).strip("[]")))


def render_help(section: str = "") -> str:
    """The help of one table, or of all if `section` is empty."""
    section = "" if section.startswith("-") else section.replace("-", "_")
    chosen = [table for table in tables() if not section or f"{table}.".startswith(f"{section}.")]
    if not chosen:
        return f"no table [{section}]; {describe_table(section)}"
    parts = [] if section else [_USAGE]
    parts += [text for table in chosen if (text := _render_table(table, in_full=bool(section)))]
    if not section:
        refused = [key for key in schema() if refusal(key)]
        parts.append(f"{len(refused)} options of torchtitan are refused: --help section says which and why.")
    return "\n\n".join(parts)


def _render_table(table: str, in_full: bool) -> str:
    lines = []
    for name in tables()[table]:
        key = f"{table}.{name}"
        option, rule = schema()[key], refusal(key)
        if key in supported_keys():
            lines.append(f"  {name}: {type_name(option.hint)} = {show(option.default)}")
            lines.append(f"      {option.doc if in_full else option.summary}".rstrip())
        elif in_full:
            lines.append(f"  {name}: refused: {rule.reason}; {rule.instead}")
    return "\n".join([f"[{table}]", *(line for line in lines if line.strip())]) if lines else ""

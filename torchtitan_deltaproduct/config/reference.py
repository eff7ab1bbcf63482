"""The options in words: `--help`, and the reference page docs/config.md.

    python -m torchtitan_deltaproduct.train --help              the tables, and names of their options
    python -m torchtitan_deltaproduct.train --help training     one table, in full
    python -m torchtitan_deltaproduct.train --help all          all, with types, defaults and first doc sentences
    python -m torchtitan_deltaproduct.config.reference > docs/config.md

Options that this toolkit refuses are listed, with the reason, only where one table is asked for.
"""

import os

from .schema import Field, describe_table, refusal, schema, tables, type_name
from .values import show

_USAGE = """\
usage: python -m torchtitan_deltaproduct.train --job.config_file FILE
           [--section.key VALUE | --section.flag | --section.no-flag] ...
       python -m torchtitan_deltaproduct.train --help section | --help all

Options of the TOML tables; every one can be overridden on the command line."""
_WIDTH = 118
"""Characters of a line of the overview."""


def asks_for_help(argv: list[str]) -> bool:
    return "--help" in argv or "-h" in argv


def print_help(argv: list[str]) -> None:
    """Prints the help that `argv` asks for, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        position = argv.index("--help" if "--help" in argv else "-h")
        print(render_help("".join(argv[position + 1 : position + 2]).strip("[]")))


def render_help(section: str = "") -> str:
    """The help of one table, of "all", or, if `section` is empty, a line a table."""
    section = "" if section.startswith("-") else section.replace("-", "_")
    if not section:
        return "\n".join([_USAGE, "", *filter(None, map(_line, tables()))])
    section = "" if section == "all" else section
    chosen = [table for table in tables() if not section or f"{table}.".startswith(f"{section}.")]
    if not chosen:
        return f"no table [{section}]; {describe_table(section)}"
    parts = [] if section else [_USAGE]
    parts += [text for table in chosen if (text := _render_table(table, in_full=bool(section)))]
    if not section:
        refused = [key for key in schema() if refusal(key)]
        parts.append(f"{len(refused)} options of torchtitan are refused: --help section says which and why.")
    return "\n\n".join(parts)


def _line(table: str) -> str:
    """A table and as many names of its options as fit; "" if all are refused."""
    names = [name for name in tables()[table] if refusal(f"{table}.{name}") is None]
    if not names:
        return ""
    text = f"  [{table}] {', '.join(names)}"
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH].rpartition(',')[0]}, ..."


def _render_table(table: str, in_full: bool) -> str:
    lines = []
    for name in tables()[table]:
        key = f"{table}.{name}"
        option, rule = schema()[key], refusal(key)
        if rule is None:
            lines.append(f"  {name}: {type_name(option.hint)} = {show(option.default)}")
            lines.append(f"      {option.doc if in_full else option.summary}".rstrip())
        elif in_full:
            lines.append(f"  {name}: refused: {rule.reason}; {rule.instead}")
    return "\n".join([f"[{table}]", *(line for line in lines if line.strip())]) if lines else ""


_INTRODUCTION = """\
# Every option of a TOML

Made by `python -m torchtitan_deltaproduct.config.reference > docs/config.md` from the records of the options.

On the command line an option is `--table.name value`. A change between two launches in one run folder is *breaking*
(refused: the result would be no continuation), *notable* (allowed, and logged) or *harmless*. Torchtitan's options that
are not listed are refused; `--help table` says why and what to use instead.
"""


def render_page() -> str:
    """The reference page, in Markdown."""
    parts = [_INTRODUCTION]
    for table in tables():
        options = [schema()[f"{table}.{name}"] for name in tables()[table]]
        options = [option for option in options if option.record.refused is None]
        if options:
            parts.append(f"## [{table}]\n\n" + "\n".join(map(_describe, options)) + "\n")
    return "\n".join(parts)


def _describe(option: Field) -> str:
    record = option.record
    facts = [record.allowed.text] if record.allowed else []
    facts += [record.reader.otherwise.format("another kind")] if record.reader else []
    facts.append(f"a change is {record.resume.kind} ({record.resume.why})")
    facts += [f"elsewhere called {', '.join(record.aliases)}"] if record.aliases else []
    sentences = "; ".join(facts)
    head = f"- **`{option.name}: {type_name(option.hint)} = {show(option.default)}`** {option.doc.rstrip('.')}."
    return f"{head}\n  {sentences[:1].upper()}{sentences[1:]}."


if __name__ == "__main__":
    print(render_page(), end="")

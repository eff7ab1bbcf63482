"""The parser of our commands, and what words of a command line become, for argparse's `type`.

parser = Parser("torchtitan_deltaproduct.compare", __doc__)
parser.add_argument("--input", type=path)       # "~/corpus" -> "/home/me/corpus"
parser.add_argument("--eos", type=text)         # UTF-8 whatever the locale says of the terminal
print(shown(os.fsdecode(b"caf\\xe9")))         # caf\\xe9
"""

import argparse
import os
import shutil
import sys

from .errors import ConfigError

COMMAND = "deltaproduct"
"""The one name of all commands, see `__main__`, which puts it and a subcommand into `sys.argv[0]`."""


class Parser(argparse.ArgumentParser):
    """Named as the user called it, `python -m MODULE` or `deltaproduct NAME`, with a help that wastes no lines.

    Args:
        module: whose command it is.
        doc: its doc string: the first line, which `--help` shows.
        usage: the words it takes; the rest is "[options]". None: argparse lists them all.
    """

    def __init__(self, module: str, doc: str, usage: str | None = None) -> None:
        prog = sys.argv[0] if sys.argv[0].startswith(f"{COMMAND} ") else f"python -m {module}"
        usage = None if usage is None else f"{prog} {usage} [options]".replace("%", "%%")
        super().__init__(prog=prog, usage=usage, description=doc.split("\n")[0], formatter_class=Help)


class Help(argparse.HelpFormatter):
    """Lines as wide as the terminal, 120 where there is none."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=shutil.get_terminal_size((120, 24)).columns)


def path(word: str) -> str:
    """A path, with `~` for the home of this user, or `~name` of another."""
    return os.path.expanduser(word)


def text(word: str) -> str:
    """Text to be read as UTF-8: Python decodes the command line by the locale, which may be Latin-1 or plain C.

    Raises:
        ConfigError: its bytes are not UTF-8.
    """
    try:
        return os.fsencode(word).decode()
    except UnicodeError:
        raise ConfigError(f"{word!a} is not UTF-8 text") from None


def seconds(word: str) -> float:
    """Seconds to wait, at least one.

    Raises:
        ConfigError: it is no such number.
    """
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 1e6:
        raise ConfigError(f"{word!a}: expected seconds, from 1 to a million")
    return value


def shown(name: str | os.PathLike) -> str:
    """A path as text for tables and pictures: its bytes as UTF-8, those that are none escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")

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
from collections.abc import Callable

from .errors import ConfigError, nearest

COMMAND = "deltaproduct"
"""The one name of all commands, see `__main__`, which puts it and a subcommand into `sys.argv[0]`."""


class Parser(argparse.ArgumentParser):
    """Named as the user called it, `python -m MODULE` or `deltaproduct NAME`, with a help that wastes no lines.

    Args:
        module: whose command it is.
        doc: its doc string: `--help` shows the first line, or all with `in_full`.
        options: of argparse's parser.
    """

    def __init__(self, module: str, doc: str, in_full: bool = False, **options) -> None:
        prog = sys.argv[0] if sys.argv[0].startswith(f"{COMMAND} ") else f"python -m {module}"
        description = doc if in_full else doc.split("\n")[0]
        super().__init__(prog=prog, description=description, formatter_class=Help, add_help=False, **options)
        # Lines that every help of argparse has, and that say nothing.
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        self._positionals.title = self._optionals.title = None

    def given(self, options: argparse.Namespace) -> list[str]:
        """The options, `--name` each, that have other values than their defaults."""
        of = {action.option_strings[-1]: action for action in self._actions if action.option_strings}
        return [name for name, action in of.items() if getattr(options, action.dest, action.default) != action.default]

    def parse_with_overrides(self, words: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """Our options, and the rest: `--section.key value` words for the trainer.

        Raises:
            ConfigError: an option that is neither.
        """
        options, overrides = self.parse_known_args(words)
        known = [name for action in self._actions for name in action.option_strings]
        for word in overrides:
            name = word.partition("=")[0]
            if name.startswith("--") and "." not in name:
                near = nearest(name, known)
                raise ConfigError(f"{word}: no such option; {f'nearest: {near}' if near else 'see --help'}")
        return options, overrides


class Help(argparse.RawDescriptionHelpFormatter):
    """Lines as wide as the terminal, 120 where there is none; what may be left out is one word of the usage.

    A number is N, whatever the option is called.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=shutil.get_terminal_size((120, 24)).columns)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if action.type in (int, float) else super()._get_default_metavar_for_optional(action)

    def _format_usage(self, usage, actions, groups, prefix):
        needed = [action for action in actions if action.required or not action.option_strings]
        if usage is not None or len(actions) - len(needed) < 6:
            return super()._format_usage(usage, actions, groups, prefix)
        return super()._format_usage(None, needed, [], prefix).rstrip() + " [options]\n\n"


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


def at_least(least: int) -> Callable[[str], int]:
    """For argparse's `type`: a whole number from `least` on."""

    def number(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"{word}: expected a whole number of at least {least}")
        return int(word)

    return number


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

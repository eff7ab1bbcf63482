"""What words of a command line become, for argparse's `type`.

parser.add_argument("--input", type=path)       # "~/corpus" -> "/home/me/corpus"
parser.add_argument("--eos", type=text)         # UTF-8 whatever the locale says of the terminal
print(shown(os.fsdecode(b"caf\\xe9")))         # caf\\xe9
"""

import os

from .errors import ConfigError


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


def shown(name: str | os.PathLike) -> str:
    """A path as text for tables and pictures: its bytes as UTF-8, those that are none escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")

"""Errors a user can cause.

Each message has one to three lines: what was found, what was expected, how to fix it. Entry points wrap their
`main` in `exit_on_user_error`, which prints the message without a traceback and exits with code 2:

    if __name__ == "__main__":
        exit_on_user_error(main)
"""

import atexit
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable


class UserError(Exception):
    """Base of every error whose cause and cure lie with the user; never raised for a bug of ours."""


class ConfigError(UserError):
    """A TOML file or command-line override that cannot be run as written."""


class DataError(UserError):
    """Input text, prepared shards or a tokenizer that are missing, damaged or do not fit together."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, damaged or belongs to another model."""


class NonFiniteError(UserError):
    """Training that cannot go on: too many steps in a row were skipped, or the weights themselves are not finite."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def exit_on_user_error(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits: with its return value, with 2 after printing a `UserError`, or with 130 after Ctrl-C.

    Only rank 0 of a torchrun job prints, so that the message appears once. The others wait: torchrun ends all ranks
    as soon as one of them is gone, and it must not be before rank 0 has spoken.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A name or a text that the locale cannot write is no reason to end.
            stream.reconfigure(errors="backslashreplace")
    if os.path.expanduser("~") == "~":
        # A container's user may have neither HOME nor an entry in passwd; libraries would make a folder named ~.
        os.environ["HOME"] = home = tempfile.mkdtemp(prefix="torchtitan_deltaproduct-")
        atexit.register(shutil.rmtree, home, ignore_errors=True)
    try:
        code = main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(5)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code or 0)

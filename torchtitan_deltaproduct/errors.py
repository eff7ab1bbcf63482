"""Errors a user can cause.

Each message has one to three lines: what was found, what was expected, how to fix it. Entry points wrap their
`main` in `exit_on_user_error`, which prints the message without a traceback and exits with code 2:

    if __name__ == "__main__":
        exit_on_user_error(main)
"""

import atexit
import contextlib
import difflib
import errno
import locale
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable


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


def nearest(name: str, names: Iterable[str], cutoff: float = 0.66) -> str | None:
    """The one of `names` most like `name`, if any is: two letters of three are common to both, in their order."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def begin_command() -> None:
    """What holds while a command imports torch, for seconds, before `exit_on_user_error` takes over.

    Ctrl-C ends it as it ends other programs, without a traceback; and libraries, torch for one, open their own UTF-8
    files as such, not in the encoding of the locale.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")


def exit_on_user_error(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits: with its return value, with 2 after printing a `UserError`, or with 130 after Ctrl-C.

    A file that cannot be read or written, and an output that nobody reads on, end it with 1 and without a traceback;
    that of a rank of a launch stays, for the log.

    Of a torchrun job rank 0 prints first, and the others wait: torchrun ends all ranks as soon as one of them is gone,
    so that a message of all appears once. What is still alive after that has an error of its own, and says so.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A name or a text that the locale cannot write is no reason to end.
            stream.reconfigure(errors="backslashreplace")
    if os.path.expanduser("~") == "~":
        # A container's user may have neither HOME nor an entry in passwd; libraries would make a folder named ~.
        os.environ["HOME"] = home = tempfile.mkdtemp(prefix="torchtitan_deltaproduct-")
        atexit.register(shutil.rmtree, home, ignore_errors=True)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        # By `begin_command`.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
        sys.stdout.flush()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(5)
        print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    except OSError as error:
        output = error.errno in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT) and error.filename is None
        file = error.filename is not None or isinstance(error, FileNotFoundError)
        if "RANK" in os.environ or not (output or file):
            raise
        if output:
            # What is still to be written would fail at the exit too, and say so.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno != errno.EPIPE:
            where = "standard output" if output else error.filename
            print(f"error: {where}: {error.strerror}" if where else f"error: {error}", file=sys.stderr, flush=True)
        code = 1
    sys.exit(code or 0)

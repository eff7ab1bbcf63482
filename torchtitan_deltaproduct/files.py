"""Files: written whole or not at all; read without waiting for a pipe that stands in the way.

write_atomically(run / "config.json", text)
text = read_text(run / "events.jsonl")
"""

import contextlib
import ctypes
import errno
import json
import os
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file to read, unbuffered.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    # A pipe that nobody writes to would block the opening without O_NONBLOCK, which regular files ignore.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file; OSError as of `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | Path, errors: str = "strict") -> str:
    """The UTF-8 text of a regular file, without the mark some editors put in front.

    Raises:
        OSError: it cannot be read, or is no regular file.
        UnicodeDecodeError: it is not UTF-8, unless `errors` says what to do then.
    """
    return read_bytes(path).decode("utf-8-sig", errors)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is none, or it does not read."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def utf8_path(path: str | Path) -> Iterator[str]:
    """The path of a file or folder that is there, for a library that writes paths in UTF-8, which this one may not be.

    Such a one is reached by its number, while the block runs.
    """
    name = str(path)
    if os.fsencode(name) == name.encode(errors="replace"):
        yield name
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes through a temporary file, so that `path` is old, new or absent, never half; text as UTF-8."""
    with replacing(path) as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` when the block ends without an error."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, content: object) -> None:
    """Writes JSON for people and programs to read, atomically."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def is_there(path: Path) -> bool:
    """Whether there is something of that name, as far as can be seen: what may not be looked at counts as there."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


def exchange(new: Path, old: Path) -> None:
    """Puts the folder `new` in the place of `old`, and `old` in that of `new`, in one step of the file system.

    Raises:
        OSError: this file system cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(old))
    if libc.renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))


def is_plain_name(name: object) -> bool:
    """Whether a name, as some file of a folder gives it, stays in that folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def control_characters(text: str) -> str:
    """The invisible characters of a text (line breaks, control codes, lone surrogates), escaped; "" if there are none.

    A value that is written into a script or a log must hold none: what follows a line break would be a command.
    """
    hidden = "".join(c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp"))
    return hidden.encode("unicode_escape").decode()

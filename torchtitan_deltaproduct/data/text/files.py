"""Which files there are, and what is in each by its name.

for file in list_files(["corpus/", "more.jsonl.gz"]): ...
kind_of("train.JSONL-00000-of-00002.gz")                  # ("json", "gzip")
"""

import gzip
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from torchtitan_deltaproduct.errors import DataError

logger = logging.getLogger(__name__)

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonlines", ".jl")
SUFFIXES = dict.fromkeys(JSON_SUFFIXES, "json") | dict.fromkeys((".parquet", ".parq", ".pq"), "parquet")
SUFFIXES |= {".csv": "csv"}
"""What is in a file, by the end of its name in lower case; all else is text."""
PACKINGS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
"""What may stand behind that, and what packed the file."""
UNREADABLE = (".lz4", ".xz", ".bz2", ".zip", ".7z", ".tar", ".tgz", ".arrow", ".feather")
OF_MANY = re.compile(r"-\d+-of-\d+$")
"""What `datasets` and others put behind the name of one file of several: `train.jsonl-00000-of-00002`."""
UTF8_BOM = b"\xef\xbb\xbf"
READ_ERRORS = (OSError, EOFError, zlib.error)
"""What reading a damaged packed file can raise."""


def kind_of(path: str | Path) -> tuple[str, str]:
    """What is in a file, by its name alone, `text`, `json`, `csv`, `parquet` or `unreadable`; and its packing or ""."""
    name = Path(OF_MANY.sub("", Path(path).name.lower()))
    packing = PACKINGS.get(name.suffix, "")
    suffix = Path(OF_MANY.sub("", name.stem if packing else name.name)).suffix
    kind = SUFFIXES.get(suffix, "unreadable" if suffix in UNREADABLE else "text")
    return "unreadable" if packing and kind == "parquet" else kind, packing


def open_unpacked(path: str | Path) -> BinaryIO:
    """What is in a file, whatever it is packed with; damage raises one of `READ_ERRORS`, here or when it is read."""
    packing = kind_of(path)[1]
    if packing == "zstd":
        import pyarrow

        # Not by the library's own opening of a path, which must be UTF-8.
        return io.BufferedReader(pyarrow.input_stream(open(path, "rb"), compression="zstd"))  # noqa: SIM115
    return gzip.open(path) if packing else open(path, "rb")


def begins_as_list(path: Path) -> bool:
    """Whether a `.json` file, which may be JSON lines, holds one list."""
    if not re.search(r"\.json\b", path.name.lower()):
        return False
    with suppress(*READ_ERRORS), open_unpacked(path) as file:
        return file.read(1 << 10).removeprefix(UTF8_BOM).lstrip().startswith(b"[")
    return False


def list_files(inputs: Iterable[str | Path], written: Iterable[str] = ()) -> list[Path]:
    """The input files: folders are searched for everything that is not hidden, in sorted order.

    Raises:
        DataError: an input does not exist or is of a kind that cannot be read, or a folder is empty, or what is
            `written`, folders that need not be there yet, would lie in it.
    """
    files, above = [], folders_above(written)
    for given in map(Path, inputs):
        if given.is_file():
            below = [given]
        elif given.is_dir():
            below = _files_below(given, above)
        else:
            wrong = (
                f"{given} is neither a file nor a folder" if given.exists() else f"There is no file or folder {given}"
            )
            raise DataError(f"{wrong}.\nCheck the path.")
        if not below:
            raise DataError(f"The folder {given} has no files in it.\nCheck the path.")
        files += below
    for file in files:
        if kind_of(file)[0] == "unreadable":
            raise DataError(
                f"{file} is of a kind that is not read here.\n"
                "Give text, JSON, CSV (also .gz or .zst) or Parquet; unpack archives first; of Arrow name the folder."
            )
    return files


@contextmanager
def result_folder(folder: Path) -> Iterator[None]:
    """Makes a folder unless it is there, and takes it away again if nothing has come into it; DataError if there cannot
    be one."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "a file is in the way" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise DataError(f"{folder} cannot be made: {why}; choose another folder") from None
    try:
        yield
    finally:
        if made:
            # It refuses a folder that holds something.
            with suppress(OSError):
                folder.rmdir()


Places = dict[tuple[int, int], str]
"""Folders by device and inode, which a link does not change: to each what is written in it."""


def folders_above(written: Iterable[str]) -> Places:
    """The folders that are written, which need not be there yet, and all that they lie in."""
    above = {}
    for name in written:
        place = Path(os.path.realpath(name))
        for outer in (place, *place.parents):
            with suppress(OSError):
                above[place_of(outer)] = name
    return above


def place_of(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def refuse_inside(folder: str | Path, above: Places) -> None:
    """Raises DataError if a folder that is read is one that something is written in."""
    if name := above.get(place_of(folder)):
        raise DataError(f"{name} lies in its own input {folder}.\nChoose a folder outside of it.")


def _files_below(folder: Path, above: Places) -> list[Path]:
    """The files of a folder; links to folders are followed, and each folder is read once, whatever leads to it."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed: {error.strerror}")

    files, seen, todo = [], set(), [str(folder)]
    for start in todo:
        for root, folders, names in os.walk(start, onerror=refuse):
            if place_of(root) in seen:
                logger.warning("%s is a link to a folder that is read already: left out", root)
                folders.clear()
                continue
            refuse_inside(root, above)
            seen.add(place_of(root))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            # What `os.walk` lists, but does not enter.
            todo += [inner for name in folders if os.path.islink(inner := os.path.join(root, name))]
            for path in (Path(root, name) for name in names if not name.startswith(".")):
                if path.is_file():
                    files.append(path)
                else:
                    logger.warning("%s is no file, or a link to none: left out", path)
    return sorted(files)


@cache
def warn_of_json(file: Path) -> None:
    """Says so once if a file that its name makes text begins like JSON lines."""
    try:
        with open_unpacked(file) as stream:
            line = stream.readline(1 << 16).removeprefix(UTF8_BOM).strip()
        is_json = line.startswith(b"{") and isinstance(json.loads(line), dict)
    except (*READ_ERRORS, ValueError, RecursionError):
        return
    if is_json:
        logger.warning("%s begins like JSON lines and is read as plain text; a name in %s makes it JSON lines",
                       file, ", ".join(JSON_SUFFIXES))  # fmt: skip

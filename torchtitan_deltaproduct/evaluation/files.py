"""Results on disk: JSON, CSV and arrays, each complete or absent, and short names for what they are of.

write_json(path, {"results": [{"loss": 3.2, "loss_se": float("nan")}]})        # NaN and infinity become null
read_results(path)                         # [{"loss": 3.2, "loss_se": None}]
write_csv(path, ["position", "loss"], [[1, 3.2], [2, float("nan")]])           # and here empty fields
write_array(Path("x.npz"), {"rank": rank, "starts": starts})
short_paths(["data/a/train", "data/b/train"])                                  # ["a/train", "b/train"]
"""

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.files import read_text, replacing, write_atomically
from torchtitan_deltaproduct.runs import short_names as short_paths_of_runs

DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a damaged JSON file raises, or looking into it."""

SLUG = 90
"""Bytes of a `slug`, at most: a file's name has two, and may have 255."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` for people and programs to read."""
    write_atomically(path, json.dumps(finite(content), indent=1) + "\n")


def finite(value: Any) -> Any:
    """`value` with None for each number in it that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(path: Path, key: str = "results") -> list[dict[str, Any]]:
    """The list of results in a file that an evaluation wrote; DataError if there is no such file, or it is damaged."""
    if not path.exists():
        raise DataError(f"There is no {path}: expected a folder in which {path.stem} left its results")
    try:
        results = json.loads(read_text(path))[key]
        if not isinstance(results, list) or not results:
            raise ValueError("no results")
    except DAMAGE as error:
        raise DataError(f"{path} cannot be read ({error!r})\nmake it again: run the eval once more") from None
    return results


def write_csv(path: Path, header: list[str], rows: Iterable[Iterable], end: str = "\r\n") -> None:
    """Writes a table; numbers with 6 digits after the point, empty where they are not finite."""

    def cell(value: Any) -> Any:
        return value if not isinstance(value, float) else f"{value:.6f}" if math.isfinite(value) else ""

    table = io.StringIO()
    writer = csv.writer(table, lineterminator=end)
    writer.writerow(header)
    writer.writerows(map(cell, row) for row in rows)
    write_atomically(path, table.getvalue())


def write_array(path: Path, content: np.ndarray | dict[str, np.ndarray]) -> None:
    """Writes one array as .npy, several as .npz."""
    with replacing(path) as file:
        if isinstance(content, dict):
            np.savez(file, **content)
        else:
            np.save(file, content)


def digest(content: dict) -> str:
    """Eight hexadecimal digits that change with the content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def slug(name: str) -> str:
    """A name for a folder: the last two parts of a path, with nothing but letters, digits, dots and lines.

    Of one that is too long for a file's name, with others beside it, the end is a digest of the whole.
    """
    last = re.sub(r"[^\w.-]+", "_", "_".join(Path(name).parts[-2:])).strip("._") or "data"
    encoded = last.encode()
    return last if len(encoded) <= SLUG else f"{encoded[: SLUG - 9].decode(errors='ignore')}_{digest({'name': name})}"


def slugs(names: list[str]) -> list[str]:
    """A `slug` for each of some names, with more of a path, or a number, where the last two parts are not enough."""
    for candidates in ([slug(name) for name in names], [slug(name.replace("/", "_")) for name in names]):
        if len(set(candidates)) == len(names):
            return candidates
    return [f"{name}_{number}" for number, name in enumerate(candidates, start=1)]


def short_paths(paths: list[str]) -> list[str]:
    """As few last parts of each path as tell them apart, two at least."""
    parts = [Path(path).parts for path in paths]
    for count in range(2, max(map(len, parts), default=2)):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(paths):
            return names
    return paths


def short_names(models: list[tuple[Path, int | None]]) -> list[str]:
    """What tells models apart: the path below the folder that all runs lie in, and the step where it is known."""
    paths = short_paths_of_runs([run for run, _ in models])
    return [name + ("" if step is None else f" step {step}") for name, (_, step) in zip(paths, models, strict=True)]

"""Results as JSON: numbers that are not finite (the standard error of one sequence, say) become null.

    write_json(path, {"results": [{"loss": 3.2, "loss_se": float("nan")}]})
    read_results(path)                         # [{"loss": 3.2, "loss_se": None}]
"""

import json
import math
from pathlib import Path
from typing import Any

from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.files import read_text


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` for people and programs to read."""
    path.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """`value` with None for each number in it that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(path: Path) -> list[dict[str, Any]]:
    """The `results` of a file that an eval wrote.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    if not path.exists():
        raise DataError(f"There is no {path}: expected a folder in which {path.stem} left its results")
    try:
        results = json.loads(read_text(path))["results"]
        if not isinstance(results, list) or not results:
            raise ValueError("no results")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error!r})\nmake it again: run the eval once more") from None
    return results

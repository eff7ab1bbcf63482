"""Results as JSON: numbers that are not finite (the standard error of one sequence, say) become null.

    write_json(path, {"loss": 3.2, "loss_se": float("nan")})
"""

import json
import math
from pathlib import Path
from typing import Any


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` for people and programs to read."""
    path.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """`value` with None for each number in it that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

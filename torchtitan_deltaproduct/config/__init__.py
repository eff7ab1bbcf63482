"""Strict job configuration: one TOML, command-line overrides, and where each value came from.

    from torchtitan_deltaproduct.config import load_config
    config = load_config(["--job.config_file", "train_configs/x.toml", "--training.steps", "10"])
    config.training.steps                 # 10
    config.provenance["training.steps"]   # "command line"

Names are imported on first use: `config.snapshots` stays free of torchtitan, which takes seconds to
import.
"""

from importlib import import_module
from typing import Any

_HOMES = {"load_config": "load", "Environment": "check", "JobConfig": "job", "Schedule": "schedule"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)

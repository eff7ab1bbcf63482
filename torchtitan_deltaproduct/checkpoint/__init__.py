"""What a checkpoint is, when it is usable, and how a model gets out of one or into one; independent of the trainer.

RUN/checkpoint/step-500/complete.json    written last, sizes and checksums: without it this is not a checkpoint
                        /.metadata       DCP index
                        /__0_0.distcp    DCP data, one or more files a rank
                        /config.json     the run's settings when this step was saved
marker.py     complete.json                               writer.py    the DCP writer that makes it
staging.py    the copy of a state that an asynchronous save writes
folders.py    scan a run's checkpoints: step, size, complete or why not; retention
ls.py         command: what a run has, and why each is kept             verify.py   command: read all of it back
safe_dcp.py   read DCP without unpickling anything but its own index classes and plain tensors
load.py       `load_model`: run folder, step or Hugging Face folder -> model
hf.py         the Hugging Face layout, ours, fla's and the paper's
to_hf.py      command: export a run, verified          from_hf.py   command: import a folder

from torchtitan_deltaproduct.checkpoint import load_model
model = load_model("outputs/run").model
"""

from importlib import import_module
from typing import Any

from .folders import CheckpointInfo, latest_complete, retention, scan

# Two of them come through `__getattr__`.
__all__ = ["CheckpointInfo", "LoadedModel", "latest_complete", "load_model", "retention", "scan"]  # noqa: F822


def __getattr__(name: str) -> Any:
    # On first use: loading brings the model and the Hugging Face libraries.
    if name in ("LoadedModel", "load_model"):
        return getattr(import_module(".load", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

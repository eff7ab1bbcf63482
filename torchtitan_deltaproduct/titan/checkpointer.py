"""torchtitan's CheckpointManager, made safe to restart from.

Saving: a folder counts once its marker is written, with the checksum of every file (`checkpoint.marker`). A save that
fails, on whatever rank, is reported and counted, its remains are removed, and it is tried again soon; training goes on.
Only the save before an end is tried until it succeeds or the run ends without it.

Loading: the newest complete checkpoint whose checksums hold, chosen by rank 0 for all; a damaged one is named and left
out. Reading never unpickles foreign objects.

Retention: over complete checkpoints only; never the newest, a milestone, one of the best, or what this package did not
write.
"""

import logging
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components import checkpoint as stock

from .. import events
from ..agreement import from_rank_0
from ..checkpoint.folders import (
    CheckpointInfo,
    Retention,
    delete,
    inspect,
    newest_first,
    no_such_step,
    scan,
    set_aside,
    step_folders,
    was_complete,
)
from ..checkpoint.load import initial_checkpoint
from ..checkpoint.marker import SAVING, ours, write_marker, wrong_checksums
from ..checkpoint.safe_dcp import SafeLoadPlanner, SafeReader
from ..checkpoint.staging import Stager
from ..checkpoint.writer import About, MarkedWriter, planner_for
from ..config.job import Checkpoint
from ..errors import CheckpointError, first_line
from ..torch_internals import forget_checkpoint_process
from .stopping import deaf_children

logger = logging.getLogger(__name__)

LAST_TRIES, PAUSE = 3, 5.0
"""Tries of the save before an end, and seconds between them."""


class CheckpointManager(stock.CheckpointManager):
    """See the module docstring. The trainer sets what is below.

    Attributes:
        snapshot: settings to store beside each save.
        run: the run folder, for events.
        failed_saves: number of saves of this launch that failed.
    """

    snapshot: dict | None = None
    run: Path = Path()

    def __init__(self, *args, checkpoint_config: Checkpoint, **kwargs) -> None:
        super().__init__(*args, checkpoint_config=checkpoint_config, **kwargs)
        self.verify_on_load, self.seed = checkpoint_config.verify_on_load, checkpoint_config.create_seed_checkpoint
        self.excluded = checkpoint_config.excluded
        self.failed_saves = 0
        self.retry_at: int | None = None
        self.saving_step: int | None = None
        self.validation: tuple[int, float | None] = (-1, None)
        self.writer_lost = False
        self.durations: list[float] = []
        self.staging = False
        self.deleter = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-deleter")
        if self.enable:
            kept = checkpoint_config.keep_every, checkpoint_config.keep_best
            self.retention = Retention(self.folder, self.keep_latest_k, *kept)
        if self.enable and self.async_mode != stock.AsyncMode.DISABLED:
            self.stager = Stager(shared=self.async_mode == stock.AsyncMode.ASYNC_WITH_PINNED_MEM)

    @property
    def save_seconds(self) -> float:
        """The longest of the last saves, from its start until it was complete; 0 before the first."""
        return max(self.durations[-5:], default=0.0)

    def due(self, step: int, last_step: bool = False) -> bool:
        """Whether `step` is to be saved: by the interval, as the last one, or because an earlier save failed."""
        owed = self.retry_at is not None and step >= self.retry_at
        return self._should_save(step, last_step) or (owed and self.enable and not self.load_only)

    @torch.no_grad()
    def save(self, curr_step: int, last_step: bool = False, reason: str = "") -> bool:
        """Saves `curr_step` if it is due or a `reason` is given; collective.

        Args:
            curr_step: optimizer steps taken.
            last_step: of the whole run.
            reason: of an extra save before the run stops, such as `SIGUSR1`: complete when this returns.

        Returns:
            Whether the step is complete on disk, or on its way there.

        Raises:
            CheckpointError: the save before an end failed for good.
        """
        if not self.enable or self.load_only or not (reason or self.due(curr_step, last_step)):
            return False
        self.finish_running_save()
        final = last_step or bool(reason)
        if final and from_rank_0(lambda: inspect(Path(self._create_checkpoint_id(curr_step)), curr_step).complete):
            return True
        why = reason or ("last step" if last_step else "interval" if curr_step % self.interval == 0 else "first step")
        why = "retry" if self.retry_at is not None and not final else why
        for attempt in range(LAST_TRIES if final else 1):
            if attempt:
                time.sleep(PAUSE)
            if self._try_to_save(curr_step, why, last_step, wait=final):
                self.retry_at = None
                self._purge_stale_checkpoints(wait=last_step)
                return True
        self.retry_at = curr_step + max(1, self.interval // 10)
        if final:
            raise CheckpointError(
                f"step {curr_step} could not be saved to {self.folder} in {LAST_TRIES} tries, see above\n"
                f"the newest complete checkpoint is {self._newest()}; make room, and start again to continue from it"
            )
        logger.warning("training goes on; the next try is at step %d", self.retry_at)
        return False

    def note_validation(self, step: int, loss: float) -> None:
        """Takes in the held-out loss of a step for the marker of its checkpoint.

        It goes to a checkpoint that is there already, too: one whose validation a signal had broken off.
        """
        self.validation = (step, loss if math.isfinite(loss) else None)
        if dist.get_rank() == 0:
            saved = inspect(Path(self._create_checkpoint_id(step)), step)
            if saved.complete and saved.marker.validation_loss is None:
                try:
                    write_marker(saved.path, replace(saved.marker, validation_loss=self.validation[1]))
                except OSError as error:
                    logger.warning("the validation loss was not noted in %s: %s", saved.path, error)

    def reserve(self) -> None:
        """Takes the memory that asynchronous saves copy to: now, since pinning it stops all work on a GPU."""
        if self.stager is not None:
            states = self._states_to_save(last_step=False)
            self.stager.reserve({k: v.state_dict() if isinstance(v, Stateful) else v for k, v in states.items()})

    def _try_to_save(self, step: int, why: str, last_step: bool, wait: bool) -> bool:
        """Writes one folder; False if it failed on any rank, and then on all."""
        folder = Path(self._create_checkpoint_id(step))
        self._make_room(folder)
        start = time.monotonic()
        states = self._states_to_save(last_step)
        loss = self.validation[1] if self.validation[0] == step else None
        writer = MarkedWriter(folder, About(step, dist.get_world_size(), why, loss), self.snapshot)
        try:
            if wait or self.async_mode == stock.AsyncMode.DISABLED:
                dcp.save(states, storage_writer=writer, planner=self._planner(last_step), no_dist=alone())
                self._saved(step, why, start)
            else:
                self._start_async(states, writer, step, why, start)
        except CheckpointException as error:
            self._failed(step, error)
            return False
        return True

    def _states_to_save(self, last_step: bool) -> dict:
        if not self._is_model_only(last_step):
            return self._flattened_model_states_sd()
        states = self.states[stock.MODEL].state_dict()
        return {name: tensor.to(self.export_dtype) for name, tensor in states.items()}

    def _is_model_only(self, last_step: bool) -> bool:
        """Whether weights alone are saved: at the end, where that is asked for, and as a seed checkpoint."""
        return last_step and (self.last_save_model_only or self.seed)

    def _planner(self, last_step: bool = False) -> DefaultSavePlanner:
        what = "weights" if self._is_model_only(last_step) else "state"
        return planner_for(f"{what} of {self.folder}, {dist.get_world_size()} ranks, {self.failed_saves} failed")

    def _start_async(self, states: dict, writer: MarkedWriter, step: int, why: str, start: float) -> None:
        pinned = self.async_mode == stock.AsyncMode.ASYNC_WITH_PINNED_MEM
        kind = AsyncCheckpointerType.PROCESS if pinned else AsyncCheckpointerType.THREAD
        if pinned:
            self._renew_lost_writers()
        with deaf_children():
            response = dcp.async_save(
                states, storage_writer=writer, planner=self._planner(), process_group=self.pg,
                async_checkpointer_type=kind, async_stager=self.stager, no_dist=alone(),
            )  # fmt: skip
        if isinstance(response, AsyncSaveResponse):
            self.save_future, self.staging_future = response.upload_completion, response.staging_completion
            self.staging = True
        else:
            self.save_future = response
        self.saving_step = step

        def done(future: Future) -> None:
            if future.exception() is None:
                self._saved(step, why, start)

        self.save_future.add_done_callback(done)

    def _renew_lost_writers(self) -> None:
        """Lets go of the processes that write, on all ranks, if one was lost: torch asks the dead one for ever."""
        lost = torch.tensor(float(self.writer_lost))
        dist.all_reduce(lost, group=self.pg)
        if lost:
            logger.warning("the processes that write checkpoints are started again")
            forget_checkpoint_process(terminate=True)
            self.writer_lost = False

    def maybe_wait_for_staging(self) -> None:
        """Waits until the weights may change: an asynchronous save of either kind may still be copying them."""
        if self.staging:
            self.staging_future.result()
            self.staging = False

    def finish_running_save(self) -> None:
        """Waits for an asynchronous save; if it failed, the next step that is due stands in for it."""
        if self.save_future is None:
            return
        future, self.save_future = self.save_future, None
        try:
            future.result()
        except (CheckpointException, Exception) as error:  # the first is a BaseException
            # An error of the writer's own comes as a CheckpointException, the same on all ranks.
            self.writer_lost |= not isinstance(error, CheckpointException)
            self._failed(self.saving_step, error)

    def _make_room(self, folder: Path) -> None:
        """Clears away what an earlier save of this step left (rank 0): ours is deleted, what is not ours moved."""
        if dist.get_rank() == 0:
            try:
                if folder.exists() and not ours(folder) and any(folder.iterdir()):
                    aside = set_aside(folder, "found")
                    logger.warning("%s was there and not written by this package: moved to %s", folder, aside)
                delete(folder)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / SAVING).touch()
            except OSError as error:
                # The save itself will fail for the same reason, on all ranks, and say so.
                logger.warning("%s cannot be prepared: %s", folder, error)
        dist.barrier()

    def _saved(self, step: int, why: str, start: float) -> None:
        seconds = time.monotonic() - start
        self.durations.append(seconds)
        if dist.get_rank() == 0:
            logger.info("saved step %d in %.1f s (%s)", step, seconds, why)
            events.append(self.run, "save", step=step, seconds=round(seconds, 2), reason=why)

    def _failed(self, step: int, error: BaseException) -> None:
        self.failed_saves += 1
        failures = getattr(error, "failures", None) or {dist.get_rank(): (error, None)}
        rank, (cause, _) = next(iter(failures.items()))
        reason = first_line(cause)
        if dist.get_rank() == 0:
            logger.warning("step %d was not saved, on rank %d: %s (%d failed so far)",
                           step, rank, reason, self.failed_saves)  # fmt: skip
            events.append(self.run, "save_failed", step=step, rank=rank, error=reason)
            try:
                delete(Path(self._create_checkpoint_id(step)))
            except OSError as left:
                logger.warning("its remains could not be removed: %s", left)

    @torch.no_grad()
    def load(self, step: int = -1) -> CheckpointInfo | None:
        """Loads the newest good checkpoint of this run, the asked `step`, or the initial one; else None. Collective.

        Raises:
            CheckpointError: `step` is not there or not good, no checkpoint is, or it does not fit the model.
        """
        if not self.enable:
            return None
        info = self._choose(step)
        if info is not None:
            # A seed checkpoint (step 0) holds weights only. A run's own checkpoint is loaded whole: what begins anew
            # would do so again at every restart.
            self.exclude_from_loading = []
            self._load_from(info, model_only=info.step == 0)
            self._set_newer_aside(info.step)
        elif self.initial_load_path:
            # Rank 0 looks for all: it may be a run that is still saving.
            info = from_rank_0(lambda: initial_checkpoint(Path(self.initial_load_path)))
            if problems := self._damage(info):
                raise CheckpointError(f"checkpoint.initial_load_path: {info.path}: {'; '.join(problems)}")
            self.exclude_from_loading = self.excluded
            self._load_from(info, model_only=self.initial_load_model_only)
        return info

    def _choose(self, asked: int) -> CheckpointInfo | None:
        # Rank 0 looks for all: on a network file system another rank may not see the newest folder yet. It looks no
        # further than it has to.
        found = newest_first(self.folder, asked) if dist.get_rank() == 0 else ()
        folders = ((info, info.complete or was_complete(info.path)) for info in found)
        damaged, spoiled = [], []
        while seen := from_rank_0(lambda: next(folders, None)):
            info, once_complete = seen
            if not info.complete:
                spoiled += [info.step] * once_complete
                if asked != -1:
                    raise CheckpointError(self._no_such_step(asked, info.reason))
                logger.warning("checkpoint step %d is left out: %s", info.step, info.reason)
                continue
            problems = self._damage(info)
            if not problems:
                return info
            logger.warning("checkpoint step %d is damaged and left out: %s", info.step, "; ".join(problems))
            if dist.get_rank() == 0:
                events.append(self.run, "bad_checkpoint", step=info.step, problems=problems)
            damaged.append(info.step)
        # What was complete once and cannot be read now, for whatever reason, is not to be trained over.
        if unusable := damaged or spoiled:
            steps = ", ".join(f"step {number}" for number in sorted(unusable))
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used: {steps} damaged\n"
                "restore one from a copy, or start over with another job.dump_folder"
            )
        if asked != -1:
            raise CheckpointError(self._no_such_step(asked))
        return None

    def _set_newer_aside(self, step: int) -> None:
        """After `load_step`: later steps belong to a past that is being written anew, and must not be resumed from."""
        if dist.get_rank() == 0 and not self.load_only:
            later = [inspect(path, number) for number, path in step_folders(self.folder) if number > step]
            newer = [info for info in reversed(later) if info.complete]
            for info in newer:
                set_aside(info.path, "rewound")
            if newer:
                logger.warning("rewound to step %d: later checkpoints renamed, %s -> step-N.rewound-*",
                               step, ", ".join(f"step-{info.step}" for info in newer))  # fmt: skip
        dist.barrier()

    def _damage(self, info: CheckpointInfo) -> list[str]:
        """What is wrong with the files of a checkpoint, each rank reading its share; the same on all."""
        if not self.verify_on_load:
            return []
        by_rank: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        mine = wrong_checksums(info.path, info.marker, dist.get_rank(), dist.get_world_size())
        dist.all_gather_object(by_rank, mine)
        return [problem for problems in by_rank for problem in problems]

    def _no_such_step(self, asked: int, reason: str = "") -> str:
        return from_rank_0(lambda: no_such_step(self.folder, asked, reason))

    def _load_from(self, info: CheckpointInfo, model_only: bool) -> None:
        states = self._states_to_load(model_only)
        try:
            reader = SafeReader(str(info.path))
            dcp.load(states, storage_reader=reader, planner=SafeLoadPlanner(), no_dist=alone())
        except (CheckpointException, RuntimeError, ValueError) as error:
            cause = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
            if isinstance(cause, OSError):
                raise cause from error
            raise CheckpointError(
                f"{info.path} does not fit this run: {first_line(cause)}\n"
                "expected the same [model] and optimizer as when it was saved (see its config.json)"
            ) from error
        self.states[stock.MODEL].load_state_dict(states)

    def _purge_stale_checkpoints(self, wait: bool = False) -> None:
        """Deletes what retention does not keep, in a thread."""
        if dist.get_rank() == 0:
            done = self.deleter.submit(self._purge, self.saving_step if self.save_future is not None else None)
            if wait:
                done.result()

    def _purge(self, running: int | None) -> None:
        try:
            surplus = self.retention.surplus()
        except OSError as error:
            logger.warning("old checkpoints are not deleted, the folder cannot be read: %s", error)
            return
        for info in surplus:
            if info.step == running:
                continue
            try:
                delete(info.path)
            except OSError as error:
                logger.warning("checkpoint step %d could not be deleted: %s", info.step, error)

    def _newest(self) -> str:
        complete = [info.step for info in scan(self.folder) if info.complete]
        return f"step {complete[-1]}" if complete else "none: the run would start over"

    def close(self) -> None:
        """Waits for a running save and for deletions."""
        # Also called on an object whose making failed, or that saves nothing.
        if getattr(self, "enable", False) and hasattr(self, "deleter"):
            self.finish_running_save()
            # Told to end: left behind, the process that writes ends with a traceback when its pipe closes.
            forget_checkpoint_process()
            self.deleter.shutdown()
        super().close()

    def __del__(self) -> None:
        """Nothing: the trainer closes it. At the interpreter's end `close` would fail, for want of modules."""


def alone() -> bool:
    """Whether this process trains alone: DCP then needs no collective.

    On a CPU one costs more than its time. gloo copies what it gathers in threads of its own, and a copy of more than 32
    KiB starts further OpenMP threads there. With more of them than cores libgomp lets waiting threads sleep at once,
    and every later training step takes 1.8 times as long.
    """
    return dist.get_world_size() == 1

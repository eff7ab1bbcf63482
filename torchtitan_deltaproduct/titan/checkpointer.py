"""torchtitan's CheckpointManager, made safe to restart from.

What differs: only complete folders are loaded or counted (`checkpoint.folders`); retention never deletes the last
complete one and touches nothing but `step-N`; an empty checkpoint folder does not disable `initial_load_path`;
reading never unpickles foreign objects; every step folder holds the run's settings; the end awaits an async save.
"""

import json
import logging
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components import checkpoint as stock

from ..checkpoint.folders import CheckpointInfo, delete, retire, scan, stale_steps
from ..checkpoint.hf import is_hf_folder
from ..checkpoint.load import find_checkpoint
from ..checkpoint.safe_dcp import SafeLoadPlanner, SafeReader
from ..errors import CheckpointError

logger = logging.getLogger(__name__)


def initial_checkpoint(path: Path) -> CheckpointInfo:
    """The checkpoint that `checkpoint.initial_load_path` names: a run folder (its newest complete step) or a step.

    Raises:
        CheckpointError: there is no complete one, or it is a Hugging Face folder, which has to be imported first.
    """
    if path.is_dir() and is_hf_folder(path):
        raise CheckpointError(
            f"checkpoint.initial_load_path = {str(path)!r} is a Hugging Face folder; import it first:\n"
            f"  python -m torchtitan_deltaproduct.checkpoint.from_hf {path} IMPORTED"
        )
    try:
        return find_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint.initial_load_path: {error}") from None


class CheckpointManager(stock.CheckpointManager):
    """See the module docstring. `snapshot` is set by the trainer: the settings to store beside each save."""

    snapshot: dict | None = None

    @torch.no_grad()
    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Saves step `curr_step` if it is due; collective."""
        if not self._should_save(curr_step, last_step):
            return
        self._async_wait()
        folder = Path(self._create_checkpoint_id(curr_step))
        if dist.get_rank() == 0:
            # What a killed save left here, or the same step of a run that was rewound: replaced as a whole.
            delete(folder)
            folder.mkdir(parents=True)
            if self.snapshot is not None:
                (folder / "config.json").write_text(json.dumps(self.snapshot, indent=1))
        dist.barrier()
        super().save(curr_step, last_step)
        if last_step:
            self._purge_stale_checkpoints()

    @torch.no_grad()
    def load(self, step: int = -1) -> CheckpointInfo | None:
        """Loads the newest complete checkpoint of this run, the asked `step`, or the initial one; else None.

        Raises:
            CheckpointError: `step` is not there or not complete, or the checkpoint does not fit the model.
        """
        if not self.enable:
            return None
        info = self._choose(step)
        if info is not None:
            # A seed checkpoint (step 0) holds weights only.
            self._load_from(info, model_only=info.step == 0)
        elif self.initial_load_path:
            info = initial_checkpoint(Path(self.initial_load_path))
            self._load_from(info, model_only=self.initial_load_model_only)
        return info

    def _choose(self, step: int) -> CheckpointInfo | None:
        found = scan(self.folder)
        complete = [info for info in found if info.complete]
        if step != -1:
            for info in complete:
                if info.step == step:
                    return info
            why = next((f": {info.reason}" for info in found if info.step == step), "")
            have = ", ".join(str(info.step) for info in complete) or "none"
            raise CheckpointError(
                f"checkpoint.load_step = {step}, but {self.folder} has no complete step {step}{why}\n"
                f"complete steps there: {have}; name one of them, or leave load_step out for the newest"
            )
        for info in found:
            if not info.complete and (not complete or info.step > complete[-1].step):
                logger.warning("skipping checkpoint step %d: %s", info.step, info.reason)
        return complete[-1] if complete else None

    def _load_from(self, info: CheckpointInfo, model_only: bool) -> None:
        states = self._states_to_load(model_only)
        try:
            dcp.load(states, storage_reader=SafeReader(str(info.path)), planner=SafeLoadPlanner())
        except (CheckpointException, RuntimeError, ValueError) as error:
            cause = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
            raise CheckpointError(
                f"{info.path} does not fit this run: {str(cause).splitlines()[0]}\n"
                "expected the same [model] and optimizer as when it was saved (see its config.json)"
            ) from error
        if stock.MODEL in self.states:
            self.states[stock.MODEL].load_state_dict(states)

    def _purge_stale_checkpoints(self) -> None:
        if self.keep_latest_k > 0 and dist.get_rank() == 0:
            complete = {info.step: info.path for info in scan(self.folder) if info.complete}
            for step in stale_steps(complete, self.keep_latest_k):
                retire(complete[step])
                self.purge_queue.put(str(complete[step]))

    def close(self) -> None:
        """Waits for a running save and for deletions."""
        if getattr(self, "save_future", None) is not None:
            self.save_future.result()
            self.save_future = None
        super().close()

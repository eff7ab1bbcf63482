"""The one way to name a model: every eval takes a run folder or one of its checkpoint steps.

    loaded = load_model("outputs/run")                       # newest complete step
    loaded = load_model("outputs/run", step=500)
    loaded = load_model("outputs/run/checkpoint/step-500", device="cuda")
    logits = loaded.model(tokens)                            # loaded.config["data"]["group"], loaded.step

Only the weights are read, whatever the number of ranks that wrote them, and nothing is unpickled but DCP's own index
(`checkpoint.safe_dcp`). The architecture is that of the `config.json` beside the weights.
"""

import logging
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchtitan_deltaproduct.checkpoint.folders import CheckpointInfo, inspect, scan
from torchtitan_deltaproduct.checkpoint.safe_dcp import SafeLoadPlanner, SafeReader, read_index
from torchtitan_deltaproduct.config.architecture import DeltaProductArgs
from torchtitan_deltaproduct.config.compare import read_snapshot
from torchtitan_deltaproduct.errors import CheckpointError
from torchtitan_deltaproduct.models import DeltaProductLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to evaluate, and what it is.

    Attributes:
        model: whole on its device, in evaluation mode, without gradients.
        config: tables of the job config it was saved under, such as `config["data"]["group"]`.
        step: optimizer steps taken.
        run: the run folder.
        label: a short name for tables, `outputs/run step 500`.
    """

    model: DeltaProductLM
    config: dict
    step: int
    run: Path
    label: str


def load_model(
    path: str | Path,
    step: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Loads a model's weights; see the module for what `path` may be.

    Args:
        path: a run folder, its folder of checkpoints, or one `step-N` of them.
        step: of the checkpoint in a run folder; None: the newest complete one.
        device: where the model goes.
        dtype: of the weights; those of the decay stay float32.

    Raises:
        CheckpointError: nothing usable is there, or the weights do not fit the config beside them.
    """
    info = find_checkpoint(path, step)
    snapshot = _snapshot_of(info.path)
    args = architecture(snapshot["config"])
    state = read_weights(info.path, args)
    with torch.device("meta"):
        model = DeltaProductLM(args)
    model.load_state_dict(state, assign=True)
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    run = run_folder(info.path)
    return LoadedModel(model, snapshot["config"], info.step, run, f"{run} step {info.step}")


def find_checkpoint(path: str | Path, step: int | None = None) -> CheckpointInfo:
    """The complete checkpoint that a path (see the module) and a step name.

    Raises:
        CheckpointError: there is none; the message says what is there.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; expected a run folder or one of its checkpoint/step-N")
    number = path.name.removeprefix("step-")
    if (path / ".metadata").exists() or (number != path.name and number.isdigit()):
        return _one_step(path, int(number) if number.isdigit() else 0, step)
    folder = path / _checkpoint_folder(path)
    found = scan(folder if folder.is_dir() else path)
    complete = [info for info in found if info.complete]
    if step is not None:
        return _asked_step(path, found, step)
    if not complete:
        why = f": the newest, step {found[-1].step}, is not usable: {found[-1].reason}" if found else ""
        raise CheckpointError(f"{path} has no complete checkpoint{why}\nexpected {folder}/step-N as training saves it")
    for info in found:
        if info.step > complete[-1].step:
            logger.warning("%s: step %d is left out: %s", path, info.step, info.reason)
    return complete[-1]


def _one_step(path: Path, number: int, step: int | None) -> CheckpointInfo:
    if step is not None and step != number:
        raise CheckpointError(f"{path} is one step, and step {step} was asked for: give its run folder")
    info = inspect(path, number)
    if not info.complete:
        raise CheckpointError(f"{path} is not usable: {info.reason}")
    return info


def _asked_step(path: Path, found: list[CheckpointInfo], step: int) -> CheckpointInfo:
    for info in found:
        if info.step == step and info.complete:
            return info
    why = next((f": {info.reason}" for info in found if info.step == step), "")
    have = ", ".join(str(info.step) for info in found if info.complete) or "none"
    raise CheckpointError(f"{path} has no complete step {step}{why}\ncomplete steps there: {have}")


def run_folder(checkpoint: Path) -> Path:
    """The run that a `step-N` folder belongs to: RUN/checkpoint/step-N, or its parent if it stands alone."""
    path = checkpoint if len(checkpoint.parts) > 2 else checkpoint.resolve()
    outer = path.parents[1]
    return outer if (outer / "config.json").exists() else path.parent


def architecture(config: dict) -> DeltaProductArgs:
    """The model that the `[model]` table of a snapshot describes; the operator's backend is chosen anew."""
    known = {f.name for f in fields(DeltaProductArgs)}
    values = {name: value for name, value in config.get("model", {}).items() if name in known}
    return DeltaProductArgs(**values | {"op_backend": "auto"})


def read_weights(folder: Path, args: DeltaProductArgs) -> dict[str, torch.Tensor]:
    """The model's state dict from a DCP folder, on the CPU, each tensor in the dtype it was saved in.

    Raises:
        CheckpointError: a parameter is missing, or has another shape than `args` says.
    """
    with torch.device("meta"):
        expected = DeltaProductLM(args).state_dict()
    saved = read_index(folder).state_dict_metadata
    missing = [name for name in expected if not isinstance(saved.get(name), TensorStorageMetadata)]
    other = [
        f"{name} is {list(saved[name].size)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name not in missing and saved[name].size != tensor.shape
    ]
    if missing or other:
        lines = [f"{name} is missing" for name in missing] + other
        raise CheckpointError(
            f"{folder} does not hold the model that its config.json describes: {'; '.join(lines[:4])}"
            + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")
        )
    state = {name: torch.empty(saved[name].size, dtype=saved[name].properties.dtype) for name in expected}
    try:
        with warnings.catch_warnings():
            # It warns that no process group is there: one process reads all shards.
            warnings.simplefilter("ignore")
            dcp.load(state, storage_reader=SafeReader(str(folder)), planner=SafeLoadPlanner(), no_dist=True)
    except (CheckpointException, RuntimeError, ValueError, OSError, EOFError) as error:
        cause = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
        said = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise CheckpointError(f"{folder} cannot be read: {said}; use another step of the run") from error
    return state


def _checkpoint_folder(run: Path) -> str:
    """Name of the folder of checkpoints in a run: `checkpoint.folder` of its config.json, else the default."""
    snapshot = read_snapshot(run / "config.json")
    return "checkpoint" if snapshot is None else snapshot["config"].get("checkpoint", {}).get("folder", "checkpoint")


def _snapshot_of(checkpoint: Path) -> dict:
    for path in (checkpoint / "config.json", run_folder(checkpoint) / "config.json"):
        snapshot = read_snapshot(path)
        if snapshot is not None:
            return snapshot
    raise CheckpointError(
        f"{checkpoint} has no config.json beside its weights, so the model is not known\n"
        "copy the config.json of the run into the folder"
    )

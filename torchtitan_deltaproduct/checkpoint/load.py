"""The one way to name a model: a run folder, one of its checkpoint steps, or a Hugging Face folder.

    loaded = load_model("outputs/run")                       # newest complete step
    loaded = load_model("outputs/run", step=500)
    loaded = load_model("outputs/run/checkpoint/step-500", device="cuda")
    loaded = load_model("exported/DP2")                      # ours, fla's, or the paper's released layout
    logits = loaded.model(tokens)                            # loaded.config["data"]["group"], loaded.step

Only the weights are read, whatever the number of ranks that wrote them. Nothing is unpickled but DCP's own index
(`safe_dcp`). The architecture is that of the `config.json` beside the weights.
"""

import logging
import os
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..arguments import path as expand
from ..config.snapshots import read_snapshot
from ..config.values import conform
from ..data.text.tokenizer import find_eos_id, tokenizer_sha256
from ..errors import CheckpointError, first_line
from ..models import DeltaProductLM
from ..models.args import DeltaProductArgs
from .folders import CheckpointInfo, checkpoint_folder, inspect, is_hf_folder, scan
from .hf import check_architecture, check_shapes, check_tokenizer_files, open_hf
from .marker import MARKER, wrong_checksums
from .safe_dcp import SafeLoadPlanner, SafeReader, read_index

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to evaluate, and what it is.

    Attributes:
        model: whole on its device, in evaluation mode, without gradients.
        config: tables of the job config it was trained under, such as `config["data"]["group"]`; {} if not known.
        step: optimizer steps taken; None if not known.
        run: the run folder, or the Hugging Face folder.
        label: a short name for tables, `outputs/run step 500`.
        tokenizer: folder with the tokenizer.json it was trained with; None if there is none.
        train_length: tokens of a training sequence; None if not known.
        eos_id: the separator between its training documents; None if not known.
        origin: of imported weights, what their folder said of itself (`from_hf`); {} for a run's own.
    """

    model: DeltaProductLM
    config: dict
    step: int | None
    run: Path
    label: str
    tokenizer: Path | None
    train_length: int | None
    eos_id: int | None = None
    origin: dict = field(default_factory=dict)

    def separator(self, tokenizer: Path, eos: str = "", option: str = "--eos TOKEN") -> int:
        """Id of the token between documents: `eos`, a text, else that of training, else what another tokenizer names.

        DataError if none is known; `option` is what a user can set, for its message.
        """
        same = self.tokenizer is None or tokenizer_sha256(tokenizer) == tokenizer_sha256(self.tokenizer)
        return self.eos_id if same and not eos and self.eos_id is not None else find_eos_id(tokenizer, eos, option)


def load_model(
    path: str | Path, step: int | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Loads a model's weights onto a device.

    Args:
        path: a run folder, its folder of checkpoints, one `step-N` of them, or a Hugging Face folder.
        step: of the checkpoint in a run folder; None: the newest complete one.
        dtype: of the weights; those of the decay stay float32.

    Raises:
        CheckpointError: nothing usable is there, or the weights do not fit the config beside them.
    """
    path = Path(expand(str(path)))
    if path.is_dir() and is_hf_folder(path):
        return _load_hf(path, step, device, dtype)
    info = find_checkpoint(path, step)
    if damaged := wrong_checksums(info.path, info.marker):
        raise CheckpointError(f"{info.path}: {'; '.join(damaged)}; use another step of the run")
    snapshot = snapshot_of(info.path)
    config, extra = snapshot["config"], snapshot.get("extra", {})
    args = architecture(config)
    model = _build(args, read_weights(info.path, args), device, dtype)
    run = run_folder(info.path)
    length = config.get("training", {}).get("seq_len")
    label, tokenizer = f"{run} step {info.step}", find_tokenizer(run, config)
    origin = extra.get("origin", {})
    origin = origin if isinstance(origin, dict) else {"folder": origin}
    return LoadedModel(model, config, info.step, run, label, tokenizer, length, extra.get("eos_id"), origin)


def _load_hf(path: Path, step: int | None, device: torch.device | str, dtype: torch.dtype) -> LoadedModel:
    if step is not None:
        raise CheckpointError(f"{path} is a Hugging Face folder, which has no steps, and step {step} was asked for")
    exported = open_hf(path)
    model = _build(exported.args, exported.weights(), device, dtype)
    config = exported.training.get("config", {})
    length = config.get("training", {}).get("seq_len") or exported.config.get("max_position_embeddings")
    step = exported.training.get("step")
    for where, number in (("training.json: step", step), ("max_position_embeddings or seq_len", length)):
        if number is not None and (type(number) is not int or number < 0):
            raise CheckpointError(f"{path}: {where} is {number!r}, expected a whole number; take the entry out")
    check_tokenizer_files(path)
    tokenizer = path if (path / "tokenizer.json").exists() else None
    return LoadedModel(model, config, step, path, str(path), tokenizer, length, exported.eos_id)


def _build(
    args: DeltaProductArgs, state: dict[str, torch.Tensor], device: torch.device | str, dtype: torch.dtype
) -> DeltaProductLM:
    with torch.device("meta"):
        model = DeltaProductLM(args)
    model.load_state_dict(state, assign=True)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def find_checkpoint(path: str | Path, step: int | None = None) -> CheckpointInfo:
    """The complete DCP checkpoint that a path (see the module) and a step name; CheckpointError says what is there."""
    path = Path(expand(str(path)))
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; expected a run folder, one of its checkpoint/step-N, or a Hugging Face folder"
        )
    number = path.name.removeprefix("step-")
    is_step = number != path.name and number.isdigit()
    if is_step or (path / MARKER).exists():
        return _one_step(path, int(number) if is_step else None, step)
    folder, _ = checkpoint_folder(path)
    checkpoints = scan(folder if folder.is_dir() else path)
    complete = [info for info in checkpoints if info.complete]
    named = next((info for info in reversed(complete) if step in (None, info.step)), None)
    if named is None and step is not None:
        why = next((f": {info.reason}" for info in checkpoints if info.step == step), "")
        have = ", ".join(str(info.step) for info in complete) or "none"
        raise CheckpointError(f"{path} has no complete step {step}{why}\ncomplete steps there: {have}")
    if named is None:
        newest = checkpoints[-1] if checkpoints else None
        why = f": the newest, step {newest.step}, is not usable: {newest.reason}" if newest else ""
        raise CheckpointError(
            f"{path} has no complete checkpoint{why}\n"
            f"expected {folder}/step-N as training saves it, or config.json and model.safetensors in {path}"
        )
    for info in checkpoints if step is None else ():
        if info.step > named.step:
            logger.warning("%s: step %d is left out: %s", path, info.step, info.reason)
    return named


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


def _one_step(path: Path, number: int | None, step: int | None) -> CheckpointInfo:
    info = inspect(path, number)
    if step not in (None, info.step):
        raise CheckpointError(f"{path} is one step, and step {step} was asked for: give its run folder")
    if not info.complete:
        raise CheckpointError(f"{path} is not usable: {info.reason}")
    return info


def run_folder(checkpoint: Path) -> Path:
    """The run that a `step-N` folder belongs to: RUN/checkpoint/step-N, or its parent if it stands alone."""
    path = checkpoint if len(checkpoint.parts) > 2 else checkpoint.resolve()
    outer = path.parents[1]
    return outer if (outer / "config.json").exists() else path.parent


def find_tokenizer(run: Path, config: dict) -> Path | None:
    """Where a run's tokenizer is: its own copy, the one its TOML names, or that of its prepared data.

    Raises:
        CheckpointError: its own copy holds links to files elsewhere, which an export would take along.
    """
    check_tokenizer_files(run / "tokenizer")
    asked, sets = config.get("model", {}).get("hf_assets_path"), config.get("data", {}).get("paths", [])
    places = [run / "tokenizer", *([Path(asked)] if asked else []), *(Path(path, "tokenizer") for path in sets)]
    return next((place for place in places if (place / "tokenizer.json").exists()), None)


def architecture(config: dict) -> DeltaProductArgs:
    """The model that a snapshot's `[model]` describes, CheckpointError if none; the backend is chosen anew."""
    known = {f.name for f in fields(DeltaProductArgs)}
    table = config.get("model", {})
    values = {name: value for name, value in table.items() if name in known} if isinstance(table, dict) else {}
    hints = get_type_hints(DeltaProductArgs)
    try:
        args = DeltaProductArgs(**{name: conform(value, hints[name]) for name, value in values.items()})
    except ValueError as error:
        raise CheckpointError(f"the [model] table of the run's config.json is damaged: {error}") from None
    args.op_backend = "auto"
    check_architecture(args)
    return args


def read_weights(folder: Path, args: DeltaProductArgs) -> dict[str, torch.Tensor]:
    """The model's state dict from a DCP folder, on the CPU, each tensor in the dtype it was saved in.

    Raises:
        CheckpointError: a parameter is missing, has another shape than `args` says, or cannot be read.
    """
    saved = {
        name: entry
        for name, entry in read_index(folder).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    names = check_shapes(folder, {name: entry.size for name, entry in saved.items()}, args)
    # Zeros, so that no index, however made, lets memory of this process through as weights.
    state = {name: torch.zeros(saved[name].size, dtype=saved[name].properties.dtype) for name in names}
    try:
        with warnings.catch_warnings():
            # It warns that no process group is there: one process reads all shards.
            warnings.simplefilter("ignore")
            dcp.load(state, storage_reader=SafeReader(str(folder)), planner=SafeLoadPlanner(), no_dist=True)
    except (CheckpointException, RuntimeError, ValueError, OSError, EOFError) as error:
        cause = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
        raise CheckpointError(f"{folder} cannot be read: {first_line(cause)}; use another step of the run") from error
    return state


def snapshot_of(checkpoint: Path) -> dict:
    """The snapshot (`config.snapshots`) beside the weights of a `step-N`, or that of its run; else CheckpointError."""
    for path in (checkpoint / "config.json", run_folder(checkpoint) / "config.json"):
        snapshot = read_snapshot(path)
        if snapshot is not None:
            return snapshot
    raise CheckpointError(
        f"{checkpoint} has no config.json beside its weights, so the model is not known\n"
        "copy the config.json of the run into the folder"
    )


def common_folder(loaded: list[LoadedModel]) -> Path:
    """The folder that all the models lie in, relative to the current one where it is inside."""
    common = Path(os.path.commonpath([model.run.resolve() for model in loaded]))
    return Path(os.path.relpath(common)) if common.is_relative_to(Path.cwd()) else common

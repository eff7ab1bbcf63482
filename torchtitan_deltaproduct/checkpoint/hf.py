"""A model in the Hugging Face layout, the one fla's `AutoModelForCausalLM` opens: reading and writing a folder.

    DP2/config.json                    fla's GatedDeltaProductConfig, every field written out
       /model.safetensors              or model-0000i-of-0000n.safetensors with model.safetensors.index.json
       /tokenizer.json, ...            the tokenizer the model was trained with
       /training.json                  ours: step, and the settings of the run that made it
       /README.md                      ours: the model card

    found = open_hf(Path("DP2")); model.load_state_dict(found.weights())
    write_hf(Path("DP2"), model.state_dict(), args, training={})

`open_hf` also takes folders of fla and the layout of the paper's released checkpoints. Nothing is unpickled: weights
come from safetensors alone.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config.architecture import DeltaProductArgs
from ..data.tokenizer import named_eos_id
from ..errors import CheckpointError, DataError, UserError
from ..models import DeltaProductLM
from ..models.hf_names import from_hf, from_hf_config, to_hf, to_hf_config

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
TRAINING = "training.json"


@dataclass(frozen=True)
class HfModel:
    """What a folder holds.

    Attributes:
        args: the architecture.
        config: config.json.
        training: training.json, `{"step": 500, "run": "outputs/run", "config": {...}}`; {} in folders of others.
    """

    folder: Path
    args: DeltaProductArgs
    config: dict
    training: dict

    @property
    def eos_id(self) -> int | None:
        """The separator of training, as far as the folder says it: ours in config.json, others' in the tokenizer first.

        What fla writes into config.json is its default where nobody set it.
        """
        if not self.training:
            with contextlib.suppress(DataError):
                if (named := named_eos_id(self.folder)) is not None:
                    return named
        eos_id = self.config.get("eos_token_id")
        return eos_id if isinstance(eos_id, int) and 0 <= eos_id < self.args.vocab_size else None

    def weights(self) -> dict[str, Tensor]:
        """The state dict under our names, on the CPU, each tensor in the dtype it was saved in.

        Raises:
            CheckpointError: files are missing or damaged, keys and shapes are not those of the architecture, or values
                are not finite floating-point numbers.
        """
        tensors = _read_tensors(self.folder)
        try:
            state = from_hf(tensors, self.args)
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder}: {error}") from None
        check_shapes(self.folder, {name: tensor.shape for name, tensor in state.items()}, self.args)
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                raise CheckpointError(f"{self.folder}: {name} is {tensor.dtype}; expected floating-point weights")
            if not tensor.isfinite().all():
                raise CheckpointError(f"{self.folder}: {name} holds values that are not finite; export another step")
        return state


def open_hf(folder: Path) -> HfModel:
    """Reads the JSON files of a folder; its weights are read by `HfModel.weights`.

    Raises:
        CheckpointError: config.json is missing, damaged, or describes another kind of model.
    """
    config = _read_json(folder / CONFIG)
    if config.get("model_type") != "gated_deltaproduct":
        raise CheckpointError(
            f"{folder / CONFIG} describes a model of type {config.get('model_type')!r}; expected 'gated_deltaproduct', "
            "as fla and torchtitan_deltaproduct.checkpoint.to_hf write it"
        )
    try:
        args = from_hf_config(config)
    except UserError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    training = _read_json(folder / TRAINING) if (folder / TRAINING).exists() else {}
    tables = training.get("config", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise CheckpointError(f"{folder / TRAINING}: config is not the tables of a run; copy it again")
    return HfModel(folder, args, config, training)


def write_hf(
    folder: Path,
    state: dict[str, Tensor],
    args: DeltaProductArgs,
    *,
    training: dict,
    max_shard_size: str = "5GB",
    **tokens: int | None,
) -> None:
    """Writes config.json, training.json and the weights into an existing folder.

    Args:
        folder: to write into.
        state: under our names, in the dtype to be written.
        args: the architecture.
        training: content of training.json.
        max_shard_size: of one file of weights, as `5GB`; larger models get several and an index.
        tokens: `max_position_embeddings`, `bos_token_id`, `eos_token_id`, `pad_token_id` of config.json.
    """
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    config = to_hf_config(args, **tokens) | {"dtype": dtype}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / TRAINING).write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
    save_torch_state_dict(to_hf(state, args), folder, max_shard_size=max_shard_size)


def make_unfinished(out: Path) -> Path:
    """Makes the folder beside `out` in which it is written, to be renamed once it is complete.

    Raises:
        CheckpointError: there cannot be a folder there.
    """
    unfinished = out.resolve().with_name(f".{out.resolve().name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        why = "a file is in the way" if isinstance(error, NotADirectoryError | FileExistsError) else error.strerror
        raise CheckpointError(f"{out} cannot be made: {why}; choose another folder") from None
    return unfinished


def check_shapes(where: Path, found: dict[str, torch.Size], args: DeltaProductArgs) -> None:
    """Raises CheckpointError if a parameter of `args` is missing from `found` or has another shape there."""
    with torch.device("meta"):
        expected = DeltaProductLM(args).state_dict()
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [
        f"{name} is {list(found[name])}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name] != tensor.shape
    ]
    if wrong:
        shown = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise CheckpointError(f"{where} does not hold the model that its config.json describes: {shown}")


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}, so the model is not known") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy it again")
    return content


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a folder, under the names they have there."""
    if (folder / INDEX).exists():
        table = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise CheckpointError(f"{folder / INDEX}: weight_map does not name a file for each tensor; copy it again")
        files = sorted(set(table.values()))
    else:
        files = [SINGLE]
    tensors: dict[str, Tensor] = {}
    for name in files:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {name}{_other_weights(folder)}")
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is cut short or damaged ({error}); copy it again") from None
    return tensors


def _other_weights(folder: Path) -> str:
    """What to say of weights in a format that could run code when read."""
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if not pickles:
        return "; expected the weights as safetensors"
    return f", only {pickles[0]}, a pickle, which is not read: convert it with transformers' save_pretrained"

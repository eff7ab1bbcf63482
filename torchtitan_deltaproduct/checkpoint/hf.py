"""A model in the Hugging Face layout, the one fla's `AutoModelForCausalLM` opens: reading and writing a folder.

    DP2/config.json                    fla's GatedDeltaProductConfig, every field written out
       /model.safetensors              or model-0000i-of-0000n.safetensors with model.safetensors.index.json
       /tokenizer.json, ...            the tokenizer the model was trained with
       /training.json                  ours: step, and the settings of the run that made it
       /README.md                      ours: the model card

    folder = open_hf(Path("DP2")); model.load_state_dict(folder.weights())
    write_hf(Path("DP2"), model.state_dict(), args, training={})

`open_hf` also takes folders of fla and the layout of the paper's released checkpoints. Nothing is unpickled: weights
come from safetensors alone.
"""

import contextlib
import errno
import glob
import json
import logging
import math
import os
import shutil
import socket
import stat
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.text.tokenizer import COMPANIONS, named_eos_id
from ..errors import CheckpointError, DataError, UserError
from ..files import exchange, is_plain_name, read_text, utf8_path, write_json
from ..models import DeltaProductLM
from ..models.args import DeltaProductArgs
from ..models.counts import total_parameters
from ..models.hf_names import from_hf, from_hf_config, to_hf, to_hf_config
from .marker import checksum

logger = logging.getLogger(__name__)

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
TRAINING = "training.json"


@dataclass(frozen=True)
class HfModel:
    """What a folder holds: the architecture, config.json and training.json."""

    folder: Path
    args: DeltaProductArgs
    config: dict
    training: dict
    """`{"step": 500, "run": "outputs/run", "config": {...}, "sha256": {...}}`; {} in folders of others."""

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
        tensors = _read_tensors(self.folder, self.args)
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
        for name, digest in self.training.get("sha256", {}).items():
            path = own_file(self.folder, name)
            if path.exists() and checksum(path)[1] != digest:
                logger.warning("%s is not what was written (its checksum differs): edited, or damaged", path)
        return state


def open_hf(folder: Path) -> HfModel:
    """Reads the JSON files of a folder; CheckpointError if they are missing, damaged, or of another kind of model."""
    config = _read_json(folder, CONFIG)
    if config.get("model_type") != "gated_deltaproduct":
        raise CheckpointError(
            f"{folder / CONFIG} describes a model of type {config.get('model_type')!r}; expected 'gated_deltaproduct', "
            "as fla and torchtitan_deltaproduct.checkpoint.to_hf write it"
        )
    try:
        args = from_hf_config(config)
        check_architecture(args)
    except UserError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    training = _read_json(folder, TRAINING) if (folder / TRAINING).exists() else {}
    tables = training.get("config", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise CheckpointError(f"{folder / TRAINING}: config is not the tables of a run; copy it again")
    if not isinstance(training.get("sha256", {}), dict):
        raise CheckpointError(f"{folder / TRAINING}: sha256 is no table of files; copy it again")
    return HfModel(folder, args, config, training)


def check_architecture(args: DeltaProductArgs) -> None:
    """Raises CheckpointError for an architecture that no TOML could ask for either."""
    for field in fields(args):
        name, value, allowed = field.name, getattr(args, field.name), field.metadata["option"].allowed
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{name} = {value}: must be a finite number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise CheckpointError(f"{name} has {len(hex(value)) - 2} hexadecimal digits: does not fit in 64 bits")
        if value is not None and allowed is not None and not allowed.allows(value):
            raise CheckpointError(f"{name} = {value}: {allowed.text}")
    if not args.has_whole_values:
        raise CheckpointError(f"expand_v = {args.expand_v}: head_dim * expand_v must be a whole number of at least 1")


def write_hf(
    folder: Path, state: dict[str, Tensor], args: DeltaProductArgs, *, training: dict, max_shard_size: str = "5GB",
    **tokens: int | None,
) -> None:  # fmt: skip
    """Writes config.json, training.json and the weights into an existing folder.

    Args:
        state: under our names, in the dtype to be written.
        training: content of training.json, to which the checksums of config.json and the weights are added.
        max_shard_size: of one file of weights, as `5GB`; larger models get several and an index.
        tokens: `max_position_embeddings`, `bos_token_id`, `eos_token_id`, `pad_token_id` of config.json.
    """
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    config = to_hf_config(args, **tokens) | {"dtype": dtype}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_torch_state_dict(to_hf(state, args), folder, max_shard_size=max_shard_size)
    # The library makes its files for their owner alone; they are to be read by whoever can read the others.
    mode = stat.S_IMODE((folder / CONFIG).stat().st_mode)
    for path in folder.glob("*.safetensors*"):
        path.chmod(mode)
    sums = {path.name: checksum(path)[1] for path in sorted([*folder.glob("*.safetensors"), folder / CONFIG])}
    write_json(folder / TRAINING, training | {"sha256": sums})


def make_unfinished(out: Path) -> Path:
    """Makes the folder beside `out` in which it is written, to be renamed once it is complete; removes abandoned ones.

    CheckpointError: there cannot be a folder there.
    """
    out, host = Path(os.path.realpath(out)), socket.gethostname()
    unfinished = out.with_name(f".{out.name}.unfinished-{host}-{os.getpid()}")
    for left in out.parent.glob(f".{glob.escape(out.name)}.unfinished-{host}-*"):
        # Of a process of this machine that was killed, or of an earlier one with this one's number.
        pid = left.name.rpartition("-")[2]
        if pid == str(os.getpid()) or not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    if _replaced(out).exists() and not out.exists():
        _replaced(out).rename(out)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        why = "a file is in the way" if isinstance(error, NotADirectoryError | FileExistsError) else error.strerror
        raise CheckpointError(f"{out} cannot be made: {why}; choose another folder") from None
    return unfinished


def put_in_place(unfinished: Path, out: Path) -> None:
    """Renames a folder of `make_unfinished` to `out`; a model that is there goes in the same step, or stays.

    CheckpointError: it cannot be.
    """
    out = Path(os.path.realpath(out))
    try:
        if out.is_dir() and any(out.iterdir()):
            _exchange(unfinished, out)
        else:
            os.replace(unfinished, out)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be replaced: {error.strerror}; delete it first, or choose another folder"
        ) from None


def _exchange(unfinished: Path, out: Path) -> None:
    """In one step, or where the file system (NFS, say) has no such step in two, between which a kill may come."""
    try:
        exchange(unfinished, out)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        replaced = _replaced(out)
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(out, replaced)
        os.rename(unfinished, out)
        shutil.rmtree(replaced, ignore_errors=True)


def _replaced(out: Path) -> Path:
    """Where a model stands aside for the moment in which another takes its place."""
    return out.with_name(f".{out.name}.replaced")


def check_shapes(where: Path, shapes: dict[str, torch.Size], args: DeltaProductArgs) -> list[str]:
    """The names of the parameters; CheckpointError if one is missing from `shapes` or has another shape there."""
    # Before a model is built, even on the meta device: what a folder says of itself may be absurd.
    if args.num_hidden_layers > len(shapes) or total_parameters(args) > 2 * sum(map(math.prod, shapes.values())):
        raise CheckpointError(
            f"{where} does not hold the model that its config.json describes: {args.num_hidden_layers:,} layers, "
            f"{total_parameters(args):,} parameters; there are {len(shapes):,} tensors"
        )
    with torch.device("meta"):
        expected = DeltaProductLM(args).state_dict()
    wrong = [f"{name} is missing" for name in expected if name not in shapes]
    wrong += [
        f"{name} is {list(shapes[name])}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in shapes and shapes[name] != tensor.shape
    ]
    if wrong:
        shown = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise CheckpointError(f"{where} does not hold the model that its config.json describes: {shown}")
    return list(expected)


def own_file(folder: Path, name: str) -> Path:
    """The file of that name in a folder, which a link may lead to where the hub's cache keeps its files.

    Raises:
        CheckpointError: the name or a link leads out of the folder, or to what is no file: a pipe would be waited for.
    """
    path = folder / name
    if not is_plain_name(name):
        raise CheckpointError(f"{folder} names {name!r}, which is no file of it; copy it again")
    if path.is_symlink():
        target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
        # snapshots/REVISION/model.safetensors -> ../../blobs/SHA
        in_cache = home.parent.name == "snapshots" and target.parent == home.parents[1] / "blobs"
        if target.parent != home and not in_cache:
            raise CheckpointError(f"{path} is a link to {target}, outside of its folder; copy the file itself")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no file; copy it again")
    return path


def check_tokenizer_files(folder: Path) -> None:
    """Raises CheckpointError for a file of the tokenizer that a link brings from elsewhere, or that is no file."""
    for name in ("tokenizer.json", *COMPANIONS):
        own_file(folder, name)


def _read_json(folder: Path, name: str) -> dict:
    path = own_file(folder, name)
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {name}, so the model is not known") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy it again")
    return content


def _read_tensors(folder: Path, args: DeltaProductArgs) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a folder, under the names they have there.

    Raises:
        CheckpointError: a file is missing, damaged or not of this folder, or there is too little in them for `args`.
    """
    if (folder / INDEX).exists():
        table = _read_json(folder, INDEX).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise CheckpointError(f"{folder / INDEX}: weight_map does not name a file for each tensor; copy it again")
        files = sorted(set(table.values()))
    else:
        files = [SINGLE]
    paths = [own_file(folder, name) for name in files]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {path.name}{_other_weights(folder)}")
    # The smallest floating-point number has one byte.
    size = sum(path.stat().st_size for path in paths)
    if total_parameters(args) > size:
        raise CheckpointError(
            f"{folder / CONFIG} describes {total_parameters(args):,} parameters, and the weights beside it have "
            f"{size:,} bytes; copy both again"
        )
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            with utf8_path(path) as name, safe_open(name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is cut short or damaged ({error}); copy it again") from None
    if args.num_hidden_layers > len(tensors):
        raise CheckpointError(
            f"{folder / CONFIG} describes {args.num_hidden_layers:,} layers, and the weights beside it have "
            f"{len(tensors):,} tensors; copy both again"
        )
    return tensors


def _other_weights(folder: Path) -> str:
    """What to say of weights in a format that could run code when read."""
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if not pickles:
        return "; expected the weights as safetensors"
    return f", only {pickles[0]}, a pickle, which is not read: convert it with transformers' save_pretrained"

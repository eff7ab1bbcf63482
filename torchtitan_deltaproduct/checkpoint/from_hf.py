"""Imports a Hugging Face folder (ours, fla's, or the paper's released layout) as a checkpoint to train from.

    python -m torchtitan_deltaproduct.checkpoint.from_hf downloads/DP2_-1_1_4k data/DP2

makes data/DP2, a run folder at step 0: config.json, the tokenizer, and checkpoint/step-0 with the weights alone. It
prints the `[model]` table to put into a TOML, and the one line that starts training from it:

    [checkpoint]
    initial_load_path = "data/DP2"

Evals take the run folder, and the Hugging Face folder itself. Every tensor is accounted for, or an error lists what is
missing and what is left over.
"""

import json
import shutil
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import torch.distributed.checkpoint as dcp

from ..arguments import Parser, path, text
from ..data.text.tokenizer import copy_tokenizer, find_eos_id
from ..errors import CheckpointError, exit_on_user_error
from ..files import write_json
from ..models import counts
from ..models.args import DeltaProductArgs
from .folders import is_hf_folder
from .hf import HfModel, check_tokenizer_files, make_unfinished, open_hf, put_in_place
from .writer import About, MarkedWriter


def import_hf(source: str | Path, out: str | Path, eos: str = "") -> HfModel:
    """Writes the run folder `out` from a Hugging Face folder; `eos`: the separator, empty: as the folder says.

    Raises:
        CheckpointError: `source` is not such a folder or is damaged, or `out` is there already. DataError: `source`
            has no token `eos`.
    """
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise CheckpointError(f"{source} {'is not a folder' if source.exists() else 'does not exist'}")
    if not is_hf_folder(source):
        raise CheckpointError(f"{source} is no Hugging Face folder: expected config.json and model.safetensors in it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already; choose another folder")
    model = open_hf(source)
    check_tokenizer_files(source)
    weights = model.weights()
    eos_id = find_eos_id(source, eos) if eos else model.eos_id
    unfinished = make_unfinished(out)
    step = unfinished / "checkpoint" / "step-0"
    try:
        if (source / "tokenizer.json").exists():
            copy_tokenizer(source, unfinished / "tokenizer", eos_id)
        snapshot = _snapshot(model, eos_id)
        write_json(unfinished / "config.json", snapshot)
        with warnings.catch_warnings():
            # It warns that no process group is there: one process writes all.
            warnings.simplefilter("ignore")
            dcp.save(weights, storage_writer=MarkedWriter(step, About(0, 1, "import"), snapshot), no_dist=True)
        put_in_place(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return model


def _snapshot(model: HfModel, eos_id: int | None) -> dict:
    """What evals and a later training run look up: the architecture, the training length, separator and origin."""
    length = model.config.get("max_position_embeddings")
    # The folder of its checkpoints is ours.
    config = {name: table for name, table in model.training.get("config", {}).items() if name != "checkpoint"}
    config |= {"model": asdict(model.args), "job": {"description": f"weights of {model.folder}"}}
    if length:
        config.setdefault("training", {"seq_len": length})
    origin = {"folder": str(model.folder.resolve()), **{key: model.training.get(key) for key in ("run", "step")}}
    return {"config": config, "derived": {}, "versions": {}, "extra": {"origin": origin, "eos_id": eos_id}}


def model_table(args: DeltaProductArgs) -> str:
    """The `[model]` table of a TOML for this architecture."""
    lines = ["[model]"]
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name not in ("op_backend", "init_scheme", "initializer_range") and value is not None:
            lines.append(f"{field.name} = {json.dumps(value)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("torchtitan_deltaproduct.checkpoint.from_hf", __doc__)
    parser.add_argument("source", type=path, metavar="HF", help="folder with config.json and model.safetensors")
    parser.add_argument("out", type=path, metavar="OUT", help="run folder to make")
    parser.add_argument("--eos", default="", type=text, metavar="TOKEN",
                        help="separator of documents (default: as HF says)")  # fmt: skip
    options = parser.parse_args(arguments)
    model = import_hf(options.source, options.out, options.eos)
    tokenizer = "with its tokenizer" if (Path(options.out) / "tokenizer").exists() else "it brings no tokenizer"
    print(f"{options.out}: {counts.total_parameters(model.args):,} parameters, {tokenizer}\n")
    print(f"To train from it:\n\n{model_table(model.args)}\n")
    print(f'[checkpoint]\ninitial_load_path = "{options.out}"')


if __name__ == "__main__":
    exit_on_user_error(main)

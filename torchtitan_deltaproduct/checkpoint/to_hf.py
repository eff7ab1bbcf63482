"""Exports a trained model to the Hugging Face layout, and verifies what was written.

    python -m torchtitan_deltaproduct.checkpoint.to_hf outputs/run exported/DP2
    python -m torchtitan_deltaproduct.checkpoint.to_hf outputs/run exported/DP2 --step 500 --dtype bfloat16

The folder gets config.json, safetensors, the tokenizer, training.json and a model card. It opens with
`AutoModelForCausalLM.from_pretrained` where fla is installed (`import fla` first) and with every eval here. It appears
under its name only after it was read back: the weights must be the run's, bit for bit in the written dtype, and give
the run's logits.
"""

import re
import shlex
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from ..arguments import Parser, path, text
from ..data.text.tokenizer import copy_tokenizer, load_tokenizer
from ..errors import CheckpointError, ConfigError, DataError, exit_on_user_error
from ..files import utf8_path
from ..formats import amount
from ..models.hf_names import to_hf as under_fla_names
from .folders import is_hf_folder
from .hf import make_unfinished, put_in_place, write_hf
from .load import LoadedModel, load_model
from .model_card import model_card

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS = 64
"""Tokens of the two sequences on which logits are compared."""


@dataclass(frozen=True)
class Verified:
    """How the written folder compares with the run: the number of tensors that are the same, and:"""

    tensors: int
    logit_difference: float
    """Largest |logit of the export - logit of the run in float32|; exactly 0 for float32."""
    fla: str
    """What fla's own class made of the folder."""


def export(
    run: str | Path, out: str | Path, *, step: int | None = None, dtype: str = "float32", max_shard_size: str = "5GB",
    tokenizer: str | Path | None = None, eos: str = "", license: str = "", overwrite: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Verified:  # fmt: skip
    """Writes `out` from anything that `load_model` takes; arguments are the options of the command.

    `dtype` is a key of `DTYPES`; the decay's parameters stay float32. `tell` is called with what is being done.

    Raises:
        CheckpointError: `run` cannot be loaded, `out` is in the way, or what was written is not what was to be.
    """
    out = Path(out)
    _check_target(out, overwrite)
    tell(f"reading {run}")
    loaded = load_model(run, step)
    source = Path(tokenizer) if tokenizer else loaded.tokenizer
    unfinished = make_unfinished(out)
    try:
        state = {name: _cast(name, tensor, DTYPES[dtype]) for name, tensor in loaded.model.state_dict().items()}
        separator = _separator(loaded, source, eos)
        ids = {} if separator is None else {"bos_token_id": separator, "eos_token_id": separator}
        length = loaded.train_length or 4096
        # Of imported weights the step and run that made them, where they are known.
        made = loaded.origin or {"step": loaded.step, "run": str(loaded.run)}
        training = {"step": made.get("step"), "run": made.get("run") or made.get("folder"), "config": loaded.config}
        tell(f"writing {amount(sum(tensor.nbytes for tensor in state.values()), 'B')}")
        write_hf(
            *(unfinished, state, loaded.model.args),
            training=training,
            max_shard_size=max_shard_size,
            **(ids | {"max_position_embeddings": length}),
        )
        if source is not None:
            copy_tokenizer(source, unfinished, separator)
        card = model_card(loaded, out.name, dtype, license)
        (unfinished / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        tell("reading it back, and opening it with fla's class")
        verified = verify(unfinished, loaded, state)
        put_in_place(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return verified


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not is_hf_folder(out):
        raise CheckpointError(f"{out} is there and is no exported model; choose another folder")
    if not overwrite:
        raise CheckpointError(f"{out} holds a model already; choose another folder, or replace it with --overwrite")


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The decay's parameters are float32 in every model: as in `models.mixer.Decay`."""
    return tensor if ".decay." in name else tensor.to(dtype)


def _separator(loaded: LoadedModel, tokenizer: Path | None, eos: str) -> int | None:
    """Id of the token that documents begin and end with, `bos` and `eos` alike; None if no tokenizer names one.

    Raises:
        CheckpointError: the tokenizer cannot be used, or its separator has no row in the embedding.
    """
    if tokenizer is None:
        if eos:
            raise CheckpointError(f"--eos {eos}: the run has no tokenizer; name one with --tokenizer FOLDER")
        return loaded.eos_id
    try:
        load_tokenizer(tokenizer)
        separator = loaded.separator(tokenizer, eos)
    except DataError as error:
        raise CheckpointError(f"the tokenizer to export cannot be used: {error}") from None
    known = loaded.model.args.vocab_size
    if separator >= known:
        raise CheckpointError(
            f"the tokenizer in {tokenizer} is not the model's: its separator has id {separator:,}, and the model has "
            f"{known:,} tokens\nname the right one with --tokenizer FOLDER"
        )
    return separator


@torch.no_grad()
def verify(folder: Path, loaded: LoadedModel, state: dict[str, torch.Tensor]) -> Verified:
    """Reads `folder` back and compares it with the run.

    `state` are the weights that were to be written, those of `loaded` are float32. CheckpointError: a tensor or a logit
    differs.
    """
    dtype = next(iter(state.values())).dtype
    written = load_model(folder, dtype=dtype).model
    tensors = written.state_dict()
    for name, tensor in state.items():
        if tensors[name].dtype != tensor.dtype or not torch.equal(tensors[name], tensor):
            raise CheckpointError(f"the export reads back with another {name}; nothing was kept: check the disk")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(loaded.model.args.vocab_size, (2, TOKENS), generator=generator)
    difference = (written.float()(tokens) - loaded.model(tokens)).abs().max().item()
    if dtype == torch.float32 and difference != 0:
        raise CheckpointError(f"the export's logits differ by {difference:.2g} from the run's; nothing was kept")
    return Verified(len(state), difference, _open_with_fla(folder, under_fla_names(state, loaded.model.args)))


def _open_with_fla(folder: Path, expected: dict[str, torch.Tensor]) -> str:
    """Opens the folder with `AutoModelForCausalLM` and compares its parameters; says what came of it."""
    try:
        with warnings.catch_warnings():
            # That there is no GPU; nothing is computed here.
            warnings.simplefilter("ignore")
            import fla.models  # noqa: F401  (registers its classes)
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging
    except Exception as error:  # a broken installation raises nearly anything
        return f"not opened with fla's class, which cannot be imported here ({type(error).__name__}: {error})"
    transformers_logging.disable_progress_bar()
    with utf8_path(folder) as name:
        theirs, report = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", output_loading_info=True, local_files_only=True
        )
    wrong = [f"{kind}: {', '.join(sorted(map(str, keys))[:4])}" for kind, keys in report.items() if keys]
    parameters = dict(theirs.named_parameters())
    wrong += [
        f"another {name}"
        for name, tensor in expected.items()
        if not torch.equal(parameters[name].float(), tensor.to(parameters[name].dtype).float())
    ]
    if wrong:
        raise CheckpointError(f"fla's {type(theirs).__name__} opens the export differently: {'; '.join(wrong[:4])}")
    return f"opened by fla's {type(theirs).__name__} with the same parameters"


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("torchtitan_deltaproduct.checkpoint.to_hf", __doc__)
    add = parser.add_argument
    add("run", type=path, metavar="RUN", help="run folder, or one of its checkpoint/step-N")
    add("out", type=path, metavar="OUT", help="folder to make")
    add("--step", type=int, help="checkpoint step (default: the newest complete one)")
    add("--dtype", choices=DTYPES, default="float32", help="of the written weights (default: %(default)s)")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of one file of weights (default: %(default)s)")
    add("--tokenizer", type=path, metavar="FOLDER", help="folder with tokenizer.json (default: the run's own)")
    add("--eos", default="", type=text, metavar="TOKEN", help="separator of documents (default: that of training)")
    add("--license", default="", metavar="ID", help="for the model card, such as apache-2.0 (default: none)")
    add("--overwrite", action="store_true", help="replace a model that is in OUT already")
    options = vars(parser.parse_args(arguments))
    if not re.fullmatch("[1-9][0-9]*(KB|MB|GB)", options["max_shard_size"]):
        raise ConfigError(f"--max-shard-size {options['max_shard_size']}: expected a size such as 500MB or 5GB")
    if not re.fullmatch(r"[a-z0-9.-]*", options["license"]):
        raise ConfigError(f"--license {options['license']}: expected an identifier such as apache-2.0 or mit")
    out = options["out"]
    # Nothing where standard error is no terminal.
    with Console(stderr=True).status("") as status:
        options["tell"] = lambda doing: status.update(escape(doing))
        verified = export(options.pop("run"), options.pop("out"), **options)
    files = sorted(file for file in Path(out).iterdir() if file.is_file())
    size = sum(file.stat().st_size for file in files)
    print(f"{out}: {', '.join(file.name for file in files)} ({size / 1e6:,.1f} MB)")
    same = "the run's logits exactly" if verified.logit_difference == 0 else (
        f"logits within {verified.logit_difference:.2g} of the run's in float32"
    )  # fmt: skip
    print(f"verified: {verified.tensors} tensors read back bit for bit, {same}; {verified.fla}")
    if not (Path(out) / "tokenizer.json").exists():
        print("note: without a tokenizer: the run names none; add one with --tokenizer FOLDER --overwrite")
    print(f"to publish it: hf upload USER/{shlex.quote(Path(out).resolve().name)} {shlex.quote(str(out))}")


if __name__ == "__main__":
    exit_on_user_error(main)

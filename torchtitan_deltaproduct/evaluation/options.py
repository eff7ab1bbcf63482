"""What all evals have in common on the command line: which models, on which device, where the results go.

parser = argparse.ArgumentParser(...); add_model_options(parser)
options = parser.parse_args(arguments)
for loaded in load_models(options): ...
folder = output_folder(options, loaded_models)
"""

import argparse
import os
from pathlib import Path

import torch

from torchtitan_deltaproduct.arguments import path, text
from torchtitan_deltaproduct.checkpoint.load import LoadedModel, common_folder, load_model
from torchtitan_deltaproduct.errors import ConfigError

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
MOST_ROWS = 8
"""Sequences that are read together unless --batch says how many."""


def add_model_options(
    parser: argparse.ArgumentParser, dtype: str = "auto", optional: bool = False, results: bool = True
) -> None:
    """Adds MODEL... (which may be `optional`), --step, --device, --dtype with its default, and, for results, --out."""
    add = parser.add_argument
    add("models", nargs="*" if optional else "+", type=path, metavar="MODEL",
        help="run folder, one of its checkpoint/step-N, or Hugging Face folder")  # fmt: skip
    add("--step", type=int, help="checkpoint step of run folders (default: the newest complete one)")
    add("--device", choices=("cpu", "cuda"), help="where to compute (default: cuda if there is one)")
    add("--dtype", choices=DTYPES, default=dtype, metavar="TYPE",
        help="float32, bfloat16, float64 or auto: bfloat16 on cuda (default: %(default)s)")  # fmt: skip
    if results:
        add("--out", type=path,
            help="folder for results (default: eval/ in that of the model, or of all)")  # fmt: skip


def add_text_options(parser: argparse.ArgumentParser, *, length: int, sequences: int, documents: str) -> None:
    """Adds --data and all that says which sequences are read, and how; with the given defaults."""
    add = parser.add_argument
    add("--data", nargs="+", default=[], type=path,
        help="prepared folder, file or folder of text, or dataset NAME[:CONFIG]")  # fmt: skip
    add("--length", type=int, default=length, help="tokens of a sequence (default: %(default)s)")
    add("--sequences", type=int, default=sequences, help="sequences at most (default: %(default)s)")
    add("--documents", choices=("auto", "long", "packed"), default=documents, metavar="KIND",
        help="long (of --length or more), packed or auto: long if enough (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, help="of the choice of sequences (default: 0; of generated words the run's)")
    add("--batch", type=int, default=0,
        help=f"sequences read together (default: {MOST_ROWS}; on a CPU fewer of long ones)")  # fmt: skip
    add("--segment", type=int, default=1024, help="tokens of a sequence read at a time (default: %(default)s)")
    add("--tokenizer", type=path, metavar="FOLDER", help="with tokenizer.json (default: that of the model)")
    add("--split", default="train", help="of a dataset (default: %(default)s)")
    add("--text-field", default="text", type=text, metavar="NAME",
        help="field or column of the text (default: %(default)s)")  # fmt: skip
    add("--eos", default="", type=text, metavar="TOKEN",
        help="separator of documents in text (default: that of training)")  # fmt: skip
    add("--search-mb", type=int, default=1024, metavar="MB",
        help="text looked through for long documents, at most (default: %(default)s)")  # fmt: skip


def need_cuda(device: str) -> None:
    """Raises ConfigError if the `device` that was asked for is of CUDA and there is none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: no CUDA device is visible; leave it out to run on the CPU")


def dtype_of(name: str, device: str) -> torch.dtype:
    """The type that a name of `DTYPES` stands for on a device."""
    return DTYPES[name] or (torch.bfloat16 if device.startswith("cuda") else torch.float32)


def load_models(options: argparse.Namespace) -> list[LoadedModel]:
    """Loads every model asked for, each once; CheckpointError if one of them cannot be loaded."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    need_cuda(device)
    loaded = [load_model(model, options.step, device, dtype_of(options.dtype, device)) for model in options.models]
    # One checkpoint under two names is one model.
    return list({(model.run.resolve(), model.step): model for model in loaded}.values())


def output_folder(options: argparse.Namespace, loaded: list[LoadedModel]) -> Path:
    """`--out`, or `eval` in the folder that all models lie in; made if need be, see `make_folder`."""
    return make_folder(Path(options.out) if options.out else common_folder(loaded) / "eval")


def make_folder(folder: Path) -> Path:
    """Makes a folder for results unless it is there; ConfigError if it cannot be made, or nothing written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        why = "a file is in the way" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise ConfigError(f"no folder for results can be made at {folder}: {why}\nname another with --out") from None
    if not writable:
        raise ConfigError(f"nothing can be written into {folder}\nname another folder for the results with --out")
    return folder


def at_least(options: argparse.Namespace, least: int, *names: str) -> None:
    """Raises ConfigError if one of the named whole numbers is given and below `least`."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")

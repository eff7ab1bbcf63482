"""The tasks of lm-eval on our checkpoints, by lm-eval's own command line.

    pip install -e ".[lm-eval]" -c constraints.txt
    python -m eval.lm_harness RUN --tasks lambada_openai,piqa,hellaswag,winogrande,arc_easy,arc_challenge,wikitext
    python -m eval.lm_harness RUN_A RUN_B --tasks swde,squad_completion,fda         the recall tasks of the paper
    python -m eval.lm_harness --model_args pretrained=RUN,step=500,dtype=float32 --tasks lambada_openai --limit 100
    python -m eval.lm_harness RUN --tasks py_choice --include_path tests/lm_tasks   a task of your own, offline
    python -m eval.lm_harness RUN --tasks arc_challenge --bos both                  in both published conventions
    torchrun --nproc_per_node 8 -m eval.lm_harness RUN --tasks hellaswag            documents shared among the ranks

RUN is a run folder (its newest complete checkpoint, or `step=`), one `checkpoint/step-N`, or a Hugging Face folder.
All other words are lm-eval's (`run --help`, `ls tasks`, `--num_fewshot`, `--log_samples`, ...); results
go to RUN/eval/lm_harness unless `--output_path` says otherwise, and `--batch_size` is by the number of tokens unless
given. Tasks on the hub need the network or its cache. Arguments of the model: `lm_harness.model`.

Published tables differ in two things, which move single cells by many points: whether each context begins with the
separator of documents (`--bos yes`; default: no; `both` runs one after the other and shows them in one table), and
whether `acc` or `acc_norm`, by the length of the answers, is told. Say which.
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from torchtitan_deltaproduct.checkpoint.folders import is_hf_folder
from torchtitan_deltaproduct.checkpoint.load import find_checkpoint, run_folder
from torchtitan_deltaproduct.data.shards.verified import file_sha256
from torchtitan_deltaproduct.errors import CheckpointError, ConfigError, DataError

from ..swept import Swept

INSTALL = 'pip install -e ".[lm-eval]" -c constraints.txt'
COMMANDS = ("run", "ls", "validate")
"""Of lm-eval's command line; without one it is `run`."""
LIST_TASKS = "list them: python -m eval.lm_harness ls tasks [--include_path FOLDER]"
CONVENTIONS = {"no": [False], "yes": [True], "both": [False, True]}
"""Of --bos: whether contexts begin with the separator, a pass each."""


def main(arguments: list[str] | None = None) -> None:
    """Runs lm-eval's command line, once for each model named before the first option; ConfigError if it cannot."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\nlm-eval's own options: python -m eval.lm_harness run --help")
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"the package lm-eval is not installed; it is an optional extra:\n{INSTALL}")
    from lm_eval.utils import setup_logging

    first_rank = os.environ.get("RANK", "0") == "0"
    setup_logging(logging.INFO if first_rank else logging.ERROR)
    command, models, words = split(words)
    passes, words = conventions(words)
    try:
        for model in models or [None]:
            for bos in passes:
                folder = execute(command, words, model, bos)
            if len(passes) > 1 and first_rank:
                Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(side_by_side(folder))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def split(words: list[str]) -> tuple[str, list[str], list[str]]:
    """The command, the models named before the first option, and the options."""
    command, words = (words[0], words[1:]) if words and words[0] in COMMANDS else ("run", words)
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return (command, words[:first], words[first:]) if command == "run" else (command, [], words)


def conventions(words: list[str]) -> tuple[list[bool | None], list[str]]:
    """What `--bos` asks for, a pass each: whether contexts begin with the separator (None: it is not given); the other
    words."""
    rest, value = list(words), ""
    for place, word in enumerate(words):
        if word == "--bos" or word.startswith("--bos="):
            value = word.partition("=")[2] if "=" in word else "".join(words[place + 1 : place + 2])
            if value not in CONVENTIONS:
                raise ConfigError(f"--bos {value}: expected {', '.join(CONVENTIONS)}")
            del rest[place : place + (1 if "=" in word else 2)]
            break
    return (CONVENTIONS[value] if value else [None]), rest


def execute(command: str, words: list[str], model: str | None, bos: bool | None = None) -> Path:
    """Hands one command over to lm-eval, `run` with our model and defaults filled in; returns the folder of results."""
    from lm_eval._cli import HarnessCLI

    if command == "run" and not words:
        raise ConfigError(f"no task is named: give --tasks NAME,NAME\n{LIST_TASKS}")
    cli, saved = HarnessCLI(), sys.argv
    # It reads and changes sys.argv.
    sys.argv = ["lm-eval", command, *words]
    try:
        namespace = cli.parse_args()
    finally:
        sys.argv = saved
    if command == "run":
        fill(namespace, model, bos)
    elif bos is not None:
        raise ConfigError(f"--bos: not read by {command}; leave it out")
    try:
        cli.execute(namespace)
    except ValueError as error:
        if not str(error).startswith(("Tasks not found", "No tasks specified")):
            raise
        raise ConfigError(f"{error}\n{LIST_TASKS}") from error
    path = Path(getattr(namespace, "output_path", None) or ".")
    return path.parent if path.suffix == ".json" else path


def fill(namespace: argparse.Namespace, model: str | None, bos: bool | None) -> None:
    """Sets what the command line and its `--config` leave open: our model, its device, batches, where results go.

    Raises:
        ConfigError: no model is named, or two are, or a chat template. CheckpointError: the model is not there.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import simple_parse_args_string

    from .model import NAME, NO_TEMPLATE

    given = EvaluatorConfig.load_yaml_config(namespace.config) if namespace.config else {}
    given |= {key: value for key, value in vars(namespace).items() if value is not None}
    if given.setdefault("model", NAME) != NAME:
        if model:
            raise ConfigError(f"{model!r} is named and --model {given['model']} too: leave one of them out")
        if bos is not None:
            raise ConfigError(f"--bos: not read with --model {given['model']}; leave it out")
        return
    of_model = given.get("model_args") or {}
    of_model = simple_parse_args_string(of_model) if isinstance(of_model, str) else dict(of_model)
    if model and "pretrained" in of_model:
        raise ConfigError(f"two models are named: {model!r} and pretrained={of_model['pretrained']}: leave one out")
    if not model and "pretrained" not in of_model:
        raise ConfigError("no model is named: put a run, checkpoint/step-N or Hugging Face folder before the options")
    of_model["pretrained"] = os.path.expanduser(model or str(of_model["pretrained"]))
    if bos is not None and "add_bos_token" in of_model:
        raise ConfigError("--bos and --model_args add_bos_token say the same: leave one of them out")
    if bos is not None:
        of_model["add_bos_token"] = bos
    if given.get("apply_chat_template"):
        raise ConfigError(NO_TEMPLATE)
    namespace.model, namespace.model_args = NAME, of_model
    namespace.device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    namespace.batch_size = given.get("batch_size", "auto")
    folder = folder_of(str(of_model["pretrained"]), of_model.get("step"))
    namespace.output_path = given.get("output_path") or str(folder / "eval/lm_harness")
    if given.get("use_cache"):
        namespace.use_cache = f"{given['use_cache']}-{cache_key(of_model, namespace.device)}"


def cache_key(of_model: dict, device: str) -> str:
    """Changes with the weights, the tokenizer and every argument of the model, whose answers are then its own."""
    arguments = {name: str(value) for name, value in of_model.items() if name not in ("pretrained", "step")}
    folder = path = Path(str(of_model["pretrained"]))
    if is_hf_folder(path):
        files = [*path.glob("*.safetensors"), path / "config.json", path / "training.json"]
        weights = {file.name: file_sha256(file) for file in files if file.is_file()}
    else:
        info = find_checkpoint(path, of_model.get("step"))
        weights, folder = info.marker.files, run_folder(info.path) / "tokenizer"
    folder = Path(arguments.pop("tokenizer", folder))
    # The separator is in the tokenizer's settings, not in tokenizer.json.
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    tokenizer = [file_sha256(folder / name) for name in names if (folder / name).is_file()]
    identity = [arguments, device.split(":")[0], weights, tokenizer]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def folder_of(model: str, step: int | None) -> Path:
    """The run folder or Hugging Face folder that a model is in."""
    if is_hf_folder(Path(model)):
        return Path(model)
    try:
        return run_folder(find_checkpoint(model, step).path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nmodels come first, or in --model_args pretrained=MODEL") from None


def metrics(folder: Path) -> dict[str, float | None]:
    """Every metric of every task, as lm-eval names them; `..., BOS` where contexts begin with the separator."""
    values = {}
    for bos, results in sorted(_newest_results(folder).items()):
        for task, numbers in results["results"].items():
            for name, value in numbers.items():
                metric, _, variant = name.partition(",")
                if isinstance(value, int | float) and not metric.endswith("_stderr") and variant:
                    metric += "" if variant == "none" else f" ({variant})"
                    values[f"{task} {metric}{', BOS' * bos}"] = float(value)
    return values


def side_by_side(folder: Path) -> Table:
    """The metrics of both conventions, a row each."""
    values = metrics(folder)
    table = Table(title="contexts without and with the separator before them", title_justify="left")
    for name in ("task and metric", "without", "with"):
        table.add_column(name, justify="left" if name.startswith("task") else "right")
    for name, value in values.items():
        if f"{name}, BOS" in values:
            table.add_row(name, f"{value:.4f}", f"{values[f'{name}, BOS']:.4f}")
    return table


def _newest_results(folder: Path) -> dict[bool, dict]:
    """What the last command made lm-eval write, by whether contexts began with the separator; DataError for nothing."""
    # By the time in their names, whatever the folder of a model that lm-eval put them into.
    files = sorted(folder.rglob("results_*.json"), key=lambda file: file.name, reverse=True)
    if not files:
        raise DataError(f"{folder} has no results_*.json of lm-eval\nmake it again: run the eval once more")
    found, made_by = {}, None
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        config = content.get("config", {})
        made_by = made_by or config.get("made_by")
        arguments = config.get("model_args") or {}
        bos = isinstance(arguments, dict) and bool(arguments.get("add_bos_token"))
        if found and (bos in found or config.get("made_by") != made_by):
            break
        found[bos] = content
    return found


class SweptHarness(Swept):
    """lm-eval's own command line: its options have underscores, and its results know the command from the model."""

    def words(self, model: str, step: int | None, data: str, out: Path, options: dict) -> list[str]:
        # The path as a word of its own: in --model_args a comma would end it, and a number be none.
        asked = [] if step is None else ["--model_args", f"step={step}"]
        return [model, *asked, "--output_path", str(out), *self.flags(options, dash="_")]

    def refusal(self, options: dict, data: str) -> str:
        # lm-eval need not be installed where a sweep is planned.
        return "" if "tasks" in options else 'expected tasks = "lambada_openai,..."'

    def made_by(self, folder: Path) -> dict:
        try:
            found = _newest_results(folder)
            made_by = next(iter(found.values()))["config"]["made_by"]
            return made_by if len(found) == len(conventions(made_by["arguments"])[0]) else {}
        except (OSError, ValueError, KeyError, DataError):
            return {}


SWEPT = SweptHarness("lm_harness", metrics)

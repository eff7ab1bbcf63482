"""The README's commands on data and models are run, on tiny data and a tiny run laid out as the README names them."""

import json
import shlex
import tomllib
from pathlib import Path

import pytest

from tests import toy as toys
from tests.launch.test_readme import COMMANDS
from tests.processes import completed
from tests.unit.evaluation.words_toy import write_toml as write_words
from torchtitan_deltaproduct.config import Environment, load_config

REPO = toys.REPO
ROOMS = ("data", "checkpoint", "status", "compare", "report")
MODULES = ("eval", *(f"torchtitan_deltaproduct.{name}" for name in ROOMS))
"""Of `python -m`: the commands that are run here. The others train, or look at this machine."""
RUN = [words for words in map(shlex.split, COMMANDS) if words[:2] == ["python", "-m"] and words[2].startswith(MODULES)]
FINEWEB = sorted((REPO / "train_configs/fineweb").glob("*.toml"))


@pytest.fixture(scope="module")
def here(toy, tmp_path_factory):
    """A folder to run in: the quick start's data and run, and runs of the other names the README gives."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("eval", "train_configs", "tests"):
        (folder / name).symlink_to(REPO / name)
    for name in ("outputs/quickstart/data", "outputs/state_tracking", "data"):
        (folder / name).mkdir(parents=True)
    (folder / "outputs/quickstart/data/stdlib").symlink_to(toy.parent / "data")
    (folder / "data/mistral").symlink_to(toy.parent / "tokenizer")
    toys.train(toy, folder / "outputs/quickstart/run")
    (folder / "book.txt").write_text("A line of the book, and another one.\n" * 2000)
    for name in ("outputs/run", "RUN"):
        (folder / name).symlink_to(folder / "outputs/quickstart/run")
    toys.train(write_words(folder / "s3.toml"), folder / "outputs/state_tracking/laptop_S3_n2_pm1/seed-1")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What stands for the dataset on the hub."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hub") / "fineweb"
    rows = [f"row {n}: " + "the text of a page. " * 20 for n in range(60)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(folder))
    return folder


def call(folder, words, *more):
    """Runs a command of the README in the folder."""
    code, printed = completed([*words[1:], *more], folder)
    assert code == 0, shlex.join(words) + "\n" + printed[-2000:]
    return printed


def test_the_commands_are_found():
    names = {words[2].rpartition(".")[2] for words in RUN}
    assert {"train_tokenizer", "prepare", "length_extrapolation", "effective_rank", "generate", "lm_harness", "sweep",
            "to_hf", "from_hf", "state_tracking", "status", "compare", "report", "ls", "verify"} <= names  # fmt: skip


# lm_eval is slow to import; tests/unit/evaluation/test_lm_harness.py calls it, too.
CASES = [pytest.param(w, marks=pytest.mark.slow) if w[2].endswith("lm_harness") else w for w in RUN]


@pytest.mark.parametrize("words", CASES, ids=lambda words: " ".join(words[2:])[:60])
def test_it_runs(here, hub, words):
    module = words[2].rpartition(".")[2]
    if module == "prepare":
        words = [{"HuggingFaceFW/fineweb:sample-100BT": str(hub), "32": "1"}.get(word, word) for word in words]
    if module == "lm_harness":
        pytest.importorskip("lm_eval")
        tasks = ["--tasks", "py_choice", "--include_path", "tests/lm_tasks", "--limit", "2"]
        words = [*words[: words.index("--tasks")], *tasks]
    needed = {"from_hf": ".to_hf", "prepare": ".train_tokenizer"}.get(module)
    if needed and not all((here / word).exists() for word in words[3:] if word.startswith(("exported/", "data/tok"))):
        call(here, next(other for other in RUN if other[2].endswith(needed)))
    printed = call(here, words)
    made = {
        "length_extrapolation": "outputs/quickstart/run/eval/length_extrapolation.csv",
        "effective_rank": "outputs/quickstart/run/eval/effective_rank.csv",
        "to_hf": "exported/quickstart/model.safetensors",
        "from_hf": "data/imported/checkpoint/step-0/complete.json",
        "train_tokenizer": "data/tokenizer/tokenizer.json",
        "prepare": f"{words[3]}/validation/manifest.json",
        "lm_harness": "RUN/eval/lm_harness",
    }
    if module in made:
        assert (here / made[module]).exists()
    else:
        assert printed.strip()


@pytest.mark.parametrize("file", FINEWEB, ids=lambda file: file.stem)
def test_the_fineweb_files_name_what_prepare_writes(file):
    """`data/fineweb` of "A real run" gets `train` and `validation`."""
    (prepare,) = (words for words in RUN if "data/fineweb" in words)
    config = tomllib.loads(file.read_text())
    assert "--validation-fraction" in prepare
    assert config["data"]["paths"] == [f"{prepare[3]}/train"]
    assert config["validation"]["paths"] == [f"{prepare[3]}/validation"]


def test_the_real_run_trains_on_them(here, hub):
    """The TOML that the README trains with, its model made small, on what its prepare command made."""
    (prepare,) = (words for words in RUN if "data/fineweb" in words)
    if not (here / "data/fineweb").exists():
        test_it_runs(here, hub, prepare)
    (toml,) = (words[2] for words in map(shlex.split, COMMANDS) if "local.sh" in words[1] and "fineweb" in words[2])
    small = {"model.hidden_size": 32, "model.num_hidden_layers": 1, "model.num_heads": 2, "model.head_dim": 16,
             "model.intermediate_size": 64, "training.seq_len": 32, "training.steps": 2, "lr_scheduler.warmup_steps": 1,
             "training.local_batch_size": 2, "training.global_batch_size": 2, "compile.enable": "false",
             "training.mixed_precision_param": "float32", "validation.freq": 2, "checkpoint.async_mode": "disabled",
             "activation_checkpoint.mode": "none"}  # fmt: skip
    options = [str(word) for key, value in small.items() for word in (f"--{key}", value)]
    module = ["python", "-m", "torchtitan_deltaproduct.train", "--job.config_file", toml]
    assert "finished: step 2 of 2" in call(here, module, *options, "--job.dump_folder", "outputs/real")
    records = map(json.loads, Path(here, "outputs/real/metrics.jsonl").read_text().splitlines())
    assert any("validation_bits_per_byte" in record for record in records)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_quick_start_fits_its_ranks(ranks):
    file = str(REPO / "train_configs/quickstart.toml")
    config = load_config(["--job.config_file", file], Environment(world_size=ranks))
    assert config.training.global_batch_size == 8

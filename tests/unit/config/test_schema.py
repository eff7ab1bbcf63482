"""The flat schema, its doc strings, and the help made of them."""

import subprocess
import sys

import pytest

from tests.toy import REPO
from torchtitan_deltaproduct.config import load_config
from torchtitan_deltaproduct.config.reference import render_help, render_page
from torchtitan_deltaproduct.config.schema import (
    aliases,
    first_sentence,
    refusal,
    schema,
    suggest_key,
    supported_keys,
    tables,
    type_name,
)  # fmt: skip


def test_schema():
    steps = schema()["training.steps"]
    assert (steps.default, steps.hint, steps.ours, steps.summary) == (
        10000,
        int,
        False,
        "How many train steps to run",
    )
    assert schema()["optimizer.lr"].ours and not schema()["optimizer.eps"].ours
    assert schema()["optimizer.eps"].summary == "Epsilon value to use"
    assert schema()["training.dataloader.num_workers"].summary == "Number of worker processes for data loading"
    assert tables()["training.dataloader"][0] == "num_workers"


def test_every_supported_option_has_a_doc_string():
    assert [key for key in supported_keys() if not schema()[key].doc] == []


def test_first_sentence():
    assert first_sentence("Local (i.e., here) thing. And more.") == "Local (i.e., here) thing"
    assert first_sentence("Version 0.2 of it") == "Version 0.2 of it"
    assert len(first_sentence("word " * 100)) <= 121


def test_type_names():
    assert type_name(schema()["training.max_norm"].hint) == "float"
    assert type_name(schema()["lr_scheduler.decay_type"].hint) == '"linear" | "sqrt" | "cosine"'
    assert type_name(schema()["data.paths"].hint) == "list of str"


def test_help_of_everything_lists_what_is_supported():
    text = render_help("all")
    assert "[training]" in text and "  steps: int = 10000\n      How many train steps to run\n" in text
    assert "tensor_parallel_degree" not in text


def test_help_without_a_word_is_an_overview():
    lines = render_help().splitlines()
    assert len(lines) < 30 and max(map(len, lines)) < 125 and not any("quantize" in line for line in lines)
    (line,) = (line for line in lines if line.startswith("  [training] "))
    assert line.startswith("  [training] local_batch_size, global_batch_size, seq_len") and "dataset" not in line


def test_help_of_a_table():
    text = render_help("parallelism")
    assert "  tensor_parallel_degree: refused: tensor parallelism is not supported yet; use " in text
    assert "[training]" not in text
    assert "nearest: [training]" in render_help("trainin")
    assert "[quantize.linear.mx]" in render_help("quantize")


def test_the_reference_page_is_current():
    """docs/config.md is made of the records; its first lines say how to make it anew."""
    assert (REPO / "docs/config.md").read_text(encoding="utf-8") == render_page()
    assert render_page().count("\n- **`") == len(supported_keys())


def test_help_exits(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(["--training.steps", "x", "--help", "lr_scheduler"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("[lr_scheduler]\n  warmup_steps: int = 200\n")


def test_aliases_lead_to_supported_options_and_are_none_themselves():
    assert len(aliases()) == sum(len(option.record.aliases) for option in schema().values()), "one name, two options"
    for alias, key in aliases().items():
        assert refusal(key) is None and alias not in tables()[schema()[key].table], key


@pytest.mark.parametrize(
    ("table", "name", "keys"),
    [
        ("training", "stepz", ["training.steps"]),
        ("training", "Seq-Len", ["training.seq_len"]),
        ("training", "batch_size", ["training.local_batch_size"]),
        ("validation", "batch_size", ["validation.local_batch_size"]),
        ("training", "learning_rate", ["optimizer.lr"]),
        ("model", "d_model", ["model.hidden_size"]),
        ("model", "lr", ["optimizer.lr"]),
        ("checkpoint", "seq_len", ["training.seq_len", "validation.seq_len"]),
        ("optimizer", "warmup_step", ["lr_scheduler.warmup_steps"]),
        ("model", "quack", []),
    ],
)
def test_suggestions(table, name, keys):
    assert suggest_key(table, name) == keys


def test_the_architecture_needs_no_torchtitan():
    program = (
        "import sys; from torchtitan_deltaproduct.models.args import DeltaProductArgs; "
        "sys.exit('torch' in sys.modules or 'torchtitan' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0

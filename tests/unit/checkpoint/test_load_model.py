"""Loading a model for evaluation: by run, by step, from shards; and what is said when it cannot be."""

import shutil
from dataclasses import replace

import pytest
import torch

from tests import toy
from tests.unit.evaluation.words_toy import write_toml
from torchtitan_deltaproduct.checkpoint.load import load_model
from torchtitan_deltaproduct.checkpoint.marker import checksum, read_marker, write_marker
from torchtitan_deltaproduct.errors import CheckpointError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Steps 1 and 2, saved by two ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    config = write_toml(folder / "s3.toml")
    toy.launch(config, folder / "run", "--checkpoint.interval", "1", "--training.local_batch_size", "2", ranks=2)
    return folder / "run"


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


@pytest.mark.parametrize(("path", "step", "expected"), [
    ("", None, 2), ("", 1, 1), ("checkpoint", None, 2), ("checkpoint/step-1", None, 1), ("checkpoint/step-2", 2, 2),
])  # fmt: skip
def test_every_way_to_name_a_model(run, path, step, expected):
    loaded = load_model(run / path, step)
    assert loaded.step == expected and loaded.run == run and loaded.label == f"{run} step {expected}"
    assert loaded.config["data"]["group"] == "S3" and not loaded.model.training
    saved = toy.weights(run, expected)
    for name, value in loaded.model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, saved[name])


def test_dtype(run):
    assert load_model(run, dtype=torch.float64).model.tok_embeddings.weight.dtype == torch.float64


def test_newest_complete_one(copy, caplog):
    (copy / "checkpoint/step-2/complete.json").unlink()
    assert load_model(copy).step == 1
    assert "step 2 is left out" in caplog.text


def rewrite(folder, change):
    """Changes the config.json of step 2 and what the marker says of it."""
    path = folder / "checkpoint/step-2/config.json"
    path.write_text(change(path.read_text()))
    marker = read_marker(path.parent)
    write_marker(path.parent, replace(marker, files=marker.files | {"config.json": checksum(path)}))


def damage_cut(folder):
    file = next((folder / "checkpoint/step-2").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-10])


def damage_config(folder):
    rewrite(folder, lambda text: text.replace('"num_householder": 2', '"num_householder": 3'))


def damage_layers(folder):
    rewrite(folder, lambda text: text.replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'))


def damage_no_config(folder):
    step = folder / "checkpoint/step-2"
    marker = read_marker(step)
    del marker.files["config.json"]
    write_marker(step, marker)
    (step / "config.json").unlink()
    (folder / "config.json").unlink()


def damage_zeros(folder):
    file = next((folder / "checkpoint/step-2").glob("*.distcp"))
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize(("damage", "said"), [
    (damage_cut, "bytes of"), (damage_config, r"k_proj.weight is \[32, 16\], expected \[48, 16\]"),
    (damage_layers, "layers.1.mixer_norm.weight is missing"), (damage_no_config, "no config.json"),
    (damage_zeros, "is not what was written"),
])  # fmt: skip
def test_what_cannot_be_loaded(copy, damage, said):
    damage(copy)
    with pytest.raises(CheckpointError, match=said):
        load_model(copy, 2)


def test_a_step_under_another_name(copy):
    (copy / "checkpoint/step-2").rename(copy / "best")
    assert load_model(copy / "best").step == 2


def test_wrong_paths_and_steps(run, tmp_path):
    for path, step, said in [
        (tmp_path / "nowhere", None, "does not exist"),
        (run / "metrics.jsonl", None, "is not a folder"),
        (tmp_path, None, "no complete checkpoint"),
        (run, 7, "complete steps there: 1, 2"),
        (run / "checkpoint/step-1", 2, "one step"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            load_model(path, step)

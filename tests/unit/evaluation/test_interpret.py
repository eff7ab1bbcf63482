"""What the heads do: beta against the weights, key subspaces of known dimension, and the files."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests import toy
from tests.unit.evaluation.words_toy import write_toml
from torchtitan_deltaproduct.evaluation import state_tracking
from torchtitan_deltaproduct.evaluation.state_tracking.interpret import spectrum, view_layers
from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.models.args import DeltaProductArgs


def test_spectrum_of_planted_keys():
    """Head 0: one direction, of both signs; head 1: three, equally often; head 2: two, at 4 : 1."""
    eye = np.eye(5)
    keys = [np.outer([1, -1, 1, -1], eye[2]), np.tile(eye[:3], (2, 1)), eye[[0, 0, 0, 0, 4]]]
    found = spectrum(np.stack([k.T @ k for k in keys]))
    assert found["dimension_95"].tolist() == [1, 3, 2]
    weights = np.sqrt([0.8, 0.2]) / np.sqrt([0.8, 0.2]).sum()
    assert found["effective_rank"] == pytest.approx([1, 3, np.exp(-(weights * np.log(weights)).sum())])
    assert found["explained"][2] == pytest.approx([0.8, 1, 1, 1, 1])
    expected = np.linalg.svd(keys[1], compute_uv=False) / np.sqrt(6)
    assert found["singular_values"][1] == pytest.approx(expected, abs=1e-7)


def test_beta_is_that_of_the_weights():
    args = DeltaProductArgs(vocab_size=6, hidden_size=16, num_hidden_layers=2, num_heads=2, head_dim=8,
                            intermediate_size=32, use_forget_gate=True)  # fmt: skip
    model = DeltaProductLM(args)
    model.init_weights()
    with torch.no_grad():
        model.layers["0"].mixer.k_proj.weight.mul_(100)  # keys far above the epsilon of their norm
    inputs = torch.randint(6, (5, 9), generator=torch.Generator().manual_seed(0))
    layers = view_layers(model, inputs, list("abcdef"))
    layer = model.layers["0"]
    with torch.no_grad():
        x = layer.mixer_norm(model.tok_embeddings.weight)
        beta = 2 * layer.mixer.b_proj(x).sigmoid().reshape(6, 2, 2)  # token, Householder, head
    for h, head in enumerate(layers[0]):
        assert np.square(head["singular_values"]).sum() == pytest.approx(1)
        for j, step in enumerate(head["householders"]):
            assert list(step["mean_by_element"].values()) == pytest.approx(beta[:, j, h].tolist(), rel=1e-5)
            assert step["mean"] == pytest.approx(beta[inputs, j, h].mean().item(), rel=1e-5)
    assert [[sum(step["histogram"]) for step in head["householders"]] for head in layers[1]] == [[45, 45], [45, 45]]
    assert "mean_by_element" not in view_layers(model, inputs, [])[0][0]["householders"][0]


def test_command(tmp_path, capsys):
    toy.train(write_toml(tmp_path / "s3.toml"), tmp_path / "run")
    state_tracking.main([str(tmp_path / "run"), "--interpret", "--words", "20"])
    assert "beta > 1.9" in capsys.readouterr().out
    content = json.loads((tmp_path / "run/eval/interpretation.json").read_text())
    head = content["layers"][0]["heads"][1]
    assert len(head["householders"]) == 2 and len(head["singular_values"]) == 8
    step = head["householders"][0]
    assert sum(step["histogram"]) == 160 == content["tokens"]
    assert list(step["mean_by_element"]) == ["e", "(1 2)", "(0 1)", "(0 1 2)", "(0 2 1)", "(0 2)"]
    assert (tmp_path / "run/eval/interpretation_layer0.png").read_bytes().startswith(b"\x89PNG")
    # Two runs whose paths end alike: each has files of its own.
    runs = [shutil.copytree(tmp_path / "run", tmp_path / name / "seed/1") for name in "ab"]
    state_tracking.main([*map(str, runs), "--interpret", "--words", "4", "--out", str(tmp_path / "out")])
    found = [json.loads(path.read_text())["run"] for path in sorted((tmp_path / "out").glob("interpretation_*.json"))]
    assert len(set(found)) == 2

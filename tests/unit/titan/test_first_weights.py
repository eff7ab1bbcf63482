"""Weights are drawn where a run begins, and not where a checkpoint's are loaded."""

import torch

from tests.toy import records, train
from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM, init


def test_a_resume_draws_nothing(toy, tmp_path, monkeypatch):
    drawn, original = [], init.draw
    monkeypatch.setattr(init, "draw", lambda name, *given: drawn.append(name) or original(name, *given))
    run, imported = tmp_path / "run", tmp_path / "imported"
    train(toy, run, "--training.steps", "2")
    assert len(drawn) == len(set(drawn)) > 10
    drawn.clear()
    train(toy, run, "--training.steps", "4")
    train(toy, imported, "--training.steps", "2", "--checkpoint.initial_load_path", str(run))
    assert drawn == [] and all(record["skipped_steps"] == 0 for record in records(run) if "loss" in record)


def test_weights_left_undrawn_are_not_finite():
    args = DeltaProductArgs(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_heads=2, head_dim=16)
    model = DeltaProductLM(args)
    with init.left_undrawn():
        model.init_weights()
    assert all(p.isnan().all() for p in model.parameters())
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters()) and torch.is_grad_enabled()

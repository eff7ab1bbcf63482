"""The batch shown for a step is the one that was trained on."""

import pytest
import torch

from tests.toy import train
from tests.unit.evaluation.words_toy import write_toml
from torchtitan_deltaproduct.data import show_batch
from torchtitan_deltaproduct.errors import CheckpointError, ConfigError


@pytest.fixture
def seen(monkeypatch):
    """Inputs of every step of a run in this process."""
    from torchtitan_deltaproduct.titan.trainer import Trainer

    batches, original = {}, Trainer.next_global_batch

    def look(self, iterator):
        found = original(self, iterator)
        batches[self.step] = torch.cat([inputs["input"] for inputs, _ in found[0]])
        return found

    monkeypatch.setattr(Trainer, "next_global_batch", look)
    return batches


def test_text(toy, tmp_path, seen, capsys):
    run = tmp_path / "run"
    train(toy, run, "--training.steps", "5")
    for step in (1, 5):
        _, first, inputs, labels = show_batch.global_batch(run, step)
        assert torch.equal(inputs["input"], seen[step]) and first == 4 * (step - 1) and labels.shape == (4, 64)
    capsys.readouterr()
    show_batch.main([str(run), "--step", "5", "--rows", "2", "--tokens", "9"])
    said = capsys.readouterr().out
    assert "samples 16 to 19 of prepared data" in said and "row 2, sample 18, 64 labels" in said and "row 1" not in said


def test_words(tmp_path, seen, capsys):
    run = tmp_path / "run"
    train(write_toml(tmp_path / "s3.toml"), run)
    assert torch.equal(show_batch.global_batch(run, 2)[2]["input"], seen[2])
    show_batch.main([str(run), "--step", "2", "--rows", "0"])
    assert "labels: " in capsys.readouterr().out


def test_wrong_use(toy, tmp_path):
    with pytest.raises(CheckpointError, match="has no config.json"):
        show_batch.main([str(tmp_path), "--step", "1"])
    train(toy, tmp_path / "run", "--training.steps", "1")
    with pytest.raises(ConfigError, match="steps count from 1"):
        show_batch.main([str(tmp_path / "run"), "--step", "0"])
    with pytest.raises(ConfigError, match="rows 0 to 3"):
        show_batch.main([str(tmp_path / "run"), "--step", "1", "--rows", "4"])
    with pytest.raises(ConfigError, match="--tokens -3: must be at least 1"):
        show_batch.main([str(tmp_path / "run"), "--step", "1", "--tokens", "-3"])

"""A trained toy language model, its vocabulary, and a random one of the same vocabulary in float64."""

from pathlib import Path

import pytest
import torch

from tests import toy as toys
from tests.unit.models.conftest import small_model
from torchtitan_deltaproduct.checkpoint.load import load_model
from torchtitan_deltaproduct.evaluation import figures
from torchtitan_deltaproduct.evaluation.generate.vocabulary import Vocabulary, open_vocabulary


@pytest.fixture(scope="session")
def toy_run(toy, tmp_path_factory) -> Path:
    """Eight steps on the toy's text, with steps 4, 6 and 8 kept."""
    folder = tmp_path_factory.mktemp("toy_run") / "run"
    toys.train(toy, folder)
    return folder


@pytest.fixture(scope="session")
def vocabulary(toy_run) -> Vocabulary:
    return open_vocabulary(load_model(toy_run))


@pytest.fixture(scope="session")
def random_model():
    """Far from its initial values: it says many different tokens."""
    model = small_model(torch.float64, vocab_size=320, num_householder=2, use_forget_gate=True)
    with torch.no_grad():
        model.tok_embeddings.weight.mul_(3)
    return model.requires_grad_(False)


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests of numbers and names: drawing takes longer than the rest, and elsewhere each picture is drawn."""
    monkeypatch.setattr(figures, "save", lambda figure, path: path.touch())

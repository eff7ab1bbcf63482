"""Fixtures shared by the suite."""

from pathlib import Path

import pytest
import torch

# As in the processes that tests start: with other thread counts sums differ in their last bits.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """The toy TOML beside its prepared data (see tests/toy.py); made once a session."""
    from tests.toy import make_data, write_toml

    return write_toml(make_data(tmp_path_factory.mktemp("toy")))

"""Fixtures of the launcher tests."""

from pathlib import Path

import pytest

from tests.launch.slurm_cluster import cluster  # noqa: F401
from tests.toy import launch


@pytest.fixture(scope="session")
def unbroken(toy, tmp_path_factory) -> Path:
    """The toy run on two ranks of one torchrun, never stopped."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    launch(toy, run, ranks=2)
    return run

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


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts shell scripts in the place of programs of SLURM: `stand_in(sbatch="echo 5")`; they run in tmp_path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")

    def stand_in(**scripts: str) -> None:
        for name, script in scripts.items():
            (programs / name).write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
            (programs / name).chmod(0o755)

    return stand_in

"""Fixtures shared by the suite."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# As in the processes that tests start: with other thread counts sums differ in their last bits.
torch.set_num_threads(1)
# Else each process that compiles starts others that import torch, to compile what is in the cache or soon will be.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """The toy TOML beside its prepared data (see tests/toy.py); made once a session."""
    from tests.toy import make_data, write_toml

    return write_toml(make_data(tmp_path_factory.mktemp("toy")))


@pytest.fixture
def forked_jobs(monkeypatch):
    """The jobs of sweeps and grids start from a process that has imported everything: see tests/processes.py."""
    from tests.processes import popen
    from torchtitan_deltaproduct import jobs

    class Forking:
        """`subprocess` as jobs.py sees it."""

        Popen = staticmethod(popen)

        def __getattr__(self, name):
            return getattr(subprocess, name)

    monkeypatch.setattr(jobs, "subprocess", Forking())


@pytest.fixture(autouse=True)
def checkpointing_is_as_in_a_new_process():
    """torchtitan counts wrapped blocks, and sets the compiler's memory budget, for the whole process."""
    yield
    if ac := sys.modules.get("torchtitan.distributed.activation_checkpoint"):
        ac._layer_sac_count, torch._functorch.config.activation_memory_budget = 0, 1.0


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    """What runs in this process leaves its signals as they were: later tests fork, and end what they forked."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before

"""Signals are noted and counted, summed over ranks into one reason; the walltime by measured durations."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from tests.toy import REPO
from torchtitan_deltaproduct.data.generated.group_words import GroupWordSource
from torchtitan_deltaproduct.data.loader import Geometry, Loader
from torchtitan_deltaproduct.events import LAUNCHED
from torchtitan_deltaproduct.titan.stopping import FLAGS, SIGNALS, Stopping


def test_signals_are_noted_and_handlers_put_back():
    before = signal.getsignal(signal.SIGUSR1)
    with Stopping() as stopping:
        assert stopping.flags() == [0.0] * FLAGS and Stopping.reason(stopping.flags()) is None
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stopping.flags() == [0.0, 0.0, 1.0, 0.0]
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(("totals", "reason"), [
    ([0, 0, 0, 0], None), ([1, 0, 0, 0], "SIGTERM"), ([0, 3, 1, 0], "SIGINT"), ([0, 0, 0, 2], "walltime"),
])  # fmt: skip
def test_reason(totals, reason):
    assert Stopping.reason(totals) == reason


def test_walltime(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    stopping = Stopping()
    assert "SLURM_JOB_END_TIME" in stopping.set_walltime(0, 60)
    # 1000 s left: 2 x 100 + 2 x 300 + 60 = 860 fit, 2 x 200 + 600 + 60 do not.
    assert not stopping.out_of_time(100, 300) and stopping.out_of_time(200, 300)
    assert Stopping.reason(stopping.flags(200, 300)) == "walltime"
    assert "guard.walltime_minutes" in stopping.set_walltime(1, 10)
    assert not stopping.out_of_time(20, 4) and stopping.out_of_time(20, 6)
    # torchrun started the ranks again half an hour after the launch.
    monkeypatch.setenv(LAUNCHED, str(time.time() - 1800))
    stopping.set_walltime(60, 0)
    assert 1700 < stopping.deadline - time.time() < 1801


def test_without_a_limit(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    stopping = Stopping()
    assert stopping.set_walltime(0, 60) == "" and not stopping.out_of_time(1e9, 1e9)


PROGRAM = """
import signal, sys, time
from pathlib import Path
from torchtitan_deltaproduct.titan.stopping import SIGNALS, deaf_children
from torchtitan_deltaproduct.torch_internals import start_compile_workers
with deaf_children():
    start_compile_workers()
import torch
from torch._inductor.async_compile import AsyncCompile
pool = AsyncCompile.process_pool()
AsyncCompile.wakeup()
time.sleep(2)
children = [int(p) for t in Path(f"/proc/self/task").iterdir() for p in (t / "children").read_text().split()]
assert pool.process.pid in children
blocked = int(next(l.split()[1] for l in Path(f"/proc/{pool.process.pid}/status").read_text().splitlines()
                   if l.startswith("SigBlk")), 16)
assert all(blocked >> (number - 1) & 1 for number in SIGNALS), hex(blocked)
assert not set(SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])
for number in SIGNALS:
    pool.process.send_signal(number)
assert torch.compile(lambda x: x.sin().sum())(torch.zeros(8)).item() == 0
assert pool.process.poll() is None
"""


@pytest.mark.slow
def test_compile_workers_outlive_a_signal(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(program)], cwd=REPO, capture_output=True, text=True, timeout=200,
                          env=os.environ | {"PYTHONPATH": str(REPO), "TORCHINDUCTOR_COMPILE_THREADS": "2"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_reading_workers_outlive_a_signal():
    """A worker that reads ahead is signalled with its rank, and goes on."""
    source = GroupWordSource("S3", 8)
    batches = iter(Loader(source, Geometry(8, 2, 2), num_workers=1, prefetch_factor=1))
    next(batches)
    for child in multiprocessing.active_children():
        for number in SIGNALS:
            os.kill(child.pid, number)
    for _ in range(5):
        inputs, _ = next(batches)
    assert torch.equal(inputs["input"], source.batch(np.arange(10, 12))[0]["input"])

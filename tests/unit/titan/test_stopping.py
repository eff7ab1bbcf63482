"""Signals are noted and counted, summed over ranks into one reason; the walltime by measured durations."""

import os
import signal
import time

import pytest

from torchtitan_deltaproduct.titan.stopping import FLAGS, Stopping


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


def test_without_a_limit(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    stopping = Stopping()
    assert stopping.set_walltime(0, 60) == "" and not stopping.out_of_time(1e9, 1e9)

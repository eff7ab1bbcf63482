"""Signals at every moment of a run, to a rank or torchrun: a complete checkpoint, and a restart that changes nothing.

bash launch/test.sh tests/dist/test_signals.py              a few, under a minute
bash launch/test.sh -m slow tests/dist/test_signals.py      the whole matrix, SIGKILL included, about 20 minutes
"""

import os
import re
import signal
import time

import pytest

from tests import processes
from tests.toy import (
    arguments,
    assert_same_weights,
    kill,
    launch,
    learned,
    log_of,
    train,
    wait_for,
    weights,
)
from torchtitan_deltaproduct.checkpoint import scan
from torchtitan_deltaproduct.events import last_stop, read_events

COMPILE = ("--compile.enable",)
ASYNC = ("--checkpoint.async_mode", "async")
MOMENTS = {
    "startup": "moment startup",
    "first step": "moment step 1",
    "step": "moment step 5",
    "save": "moment save of step 4",
    "validation": "moment validation at 4",
    "last step": "moment step 8",
}


def begin(config, run, *options, ranks=1):
    """Starts `slow_train`, under our torchrun for several ranks."""
    module = ["-m", "tests.dist.slow_train", *arguments(config, run, options)]
    torchrun = ["-m", "launch.torchrun", "--standalone", "--nproc_per_node", str(ranks)]
    return processes.start(module if ranks == 1 else [*torchrun, *module], f"{run}.log")


def pid_of(run, rank: int) -> int:
    return int(re.findall(rf"on rank {rank}, pid (\d+)", log_of(run))[-1])


@pytest.fixture(scope="module")
def unbroken(toy, tmp_path_factory):
    """What runs under the given options learn when nothing stops them, made once each."""
    made = {}

    def make(options=(), ranks=1):
        if (options, ranks) not in made:
            run = tmp_path_factory.mktemp("unbroken") / "run"
            if ranks == 1:
                train(toy, run, *options)
            else:
                launch(toy, run, *options, ranks=ranks)
            made[options, ranks] = run
        return made[options, ranks]

    return make


def stop_and_go_on(toy, run, unbroken, moment, number, *, target="rank 0", ranks=1, options=(), twice=False):
    """Signals a run at a moment, checks how it ended, lets it go on, and compares it with one that never stopped."""
    process = begin(toy, run, *options, ranks=ranks)
    for rank in range(ranks):
        wait_for(run, f"{MOMENTS[moment]} on rank {rank}", 240)
    pid = process.pid if target == "torchrun" else pid_of(run, int(target.split()[1]))
    if number == signal.SIGKILL and target == "torchrun":
        kill(process)
    else:
        os.kill(pid, number)
    if twice:
        time.sleep(0.1)
        os.kill(pid, number)
    code = process.wait(timeout=240)
    stop = last_stop(read_events(run))
    if number != signal.SIGKILL:
        assert code == (128 + number if target == "torchrun" else 0), log_of(run)[-3000:]
        assert (stop["reason"], stop["detail"], stop["saved"]) == ("signal", signal.Signals(number).name, True)
        complete = [info for info in scan(run / "checkpoint") if info.complete]
        assert [info.step for info in complete][-1:] == ([stop["step"]] if stop["step"] else [])
        assert "Traceback" not in log_of(run)
    if ranks == 1:
        train(toy, run, *options)
    else:
        launch(toy, run, *options, ranks=ranks)
    reference = unbroken(options, ranks)
    assert learned(run) == learned(reference)
    assert_same_weights(weights(run, 8), weights(reference, 8))
    return stop


@pytest.mark.parametrize(("moment", "number", "options", "twice", "step"), [
    ("startup", signal.SIGTERM, (), False, 0),
    ("step", signal.SIGINT, (), True, 5),
    ("save", signal.SIGUSR1, ASYNC, False, 5),
    pytest.param("validation", signal.SIGUSR1, (), True, 4, marks=pytest.mark.slow),
    pytest.param("last step", signal.SIGTERM, (), False, 8, marks=pytest.mark.slow),
])  # fmt: skip
def test_one_process(toy, tmp_path, unbroken, moment, number, options, twice, step):
    stop = stop_and_go_on(toy, tmp_path / "run", unbroken, moment, number, options=options, twice=twice)
    assert stop["step"] == step


def test_one_rank_of_two(toy, tmp_path, unbroken):
    """Only rank 1 is signalled; both end after the same step."""
    stop_and_go_on(toy, tmp_path / "run", unbroken, "step", signal.SIGUSR1, target="rank 1", ranks=2)
    assert log_of(tmp_path / "run").count("stopped on SIGUSR1 after step 5") == 2


def test_ranks_end_with_the_launcher(toy, tmp_path):
    """SIGKILL to torchrun alone: its rank saves what it has and ends."""
    run = tmp_path / "run"
    module = ["-m", "tests.dist.slow_train", *arguments(toy, run, ())]
    process = processes.start(["-m", "launch.torchrun", "--standalone", "--nproc_per_node", "1", *module], f"{run}.log")
    wait_for(run, f"{MOMENTS['step']} on rank 0", 240)
    os.kill(process.pid, signal.SIGKILL)
    wait_for(run, "stopped on SIGTERM after step 5", 60)
    stop = last_stop(read_events(run))
    assert (stop["reason"], stop["detail"], stop["step"], stop["saved"]) == ("signal", "SIGTERM", 5, True)


@pytest.mark.slow  # torchrun's restarts are in test_faults.py, too: of a rank that hangs.
def test_torchrun_restarts_a_killed_rank(toy, tmp_path, unbroken):
    run = tmp_path / "run"
    module = ["-m", "tests.dist.slow_train", *arguments(toy, run, ())]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    process = processes.start([*torchrun, *module], f"{run}.log")
    wait_for(run, MOMENTS["step"], 240)
    os.kill(pid_of(run, 1), signal.SIGKILL)
    assert process.wait(timeout=240) == 0, log_of(run)[-3000:]
    assert "resumed step 4 of 8" in log_of(run) and "the last launch lost a rank: " in log_of(run)
    assert learned(run) == learned(unbroken((), 2))
    assert_same_weights(weights(run, 8), weights(unbroken((), 2), 8))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL], ids=lambda n: n.name)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("ranks", "target", "options"), [
    (1, "rank 0", ()), (1, "rank 0", ASYNC), (2, "torchrun", ()), (2, "torchrun", ASYNC), (2, "rank 1", COMPILE),
], ids=["1-sync", "1-async", "2-torchrun", "2-torchrun-async", "2-rank1-compile"])  # fmt: skip
def test_matrix(toy, tmp_path, unbroken, ranks, target, options, moment, number):
    stop_and_go_on(toy, tmp_path / "run", unbroken, moment, number, target=target, ranks=ranks, options=options)

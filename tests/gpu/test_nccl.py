"""Two GPUs under NCCL: FSDP2, HSDP, a lost rank, a signal, a hang: python -m pytest -m gpu tests/gpu/test_nccl.py

Losses on a GPU agree to rounding, not to the bit; the runs on CPU ranks in tests/dist are held to the bit.
"""

import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from tests import toy as toys
from torchtitan_deltaproduct.checkpoint import scan
from torchtitan_deltaproduct.events import last_stop, read_events

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
# Heads that fla's kernels take; a global batch that one rank and two take in the same order.
MODEL = ("--model.hidden_size", "128", "--model.head_dim", "64", "--data.reset_state_at_documents")
COMPILE = ("--compile.enable",)


@pytest.fixture(scope="module")
def one(toy, tmp_path_factory):
    """The run of one rank to which the others are compared."""
    run = tmp_path_factory.mktemp("one") / "run"
    toys.launch(toy, run, *MODEL)
    return run


def assert_agree(run, reference):
    ours, theirs = toys.learned(run), toys.learned(reference)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if "loss" in key[1]:
            assert math.isclose(ours[key], value, rel_tol=2e-2), (key, ours[key], value)


def start(toy, run, *options, **environment):
    """`slow_train` on two ranks under our torchrun, started again once."""
    module = ["-m", "tests.dist.slow_train", *toys.arguments(toy, run, (*MODEL, *options))]
    torchrun = ["-m", "launch.torchrun", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    with open(f"{run}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, *torchrun, *module], stdout=log, stderr=log, cwd=toys.REPO,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, start_new_session=True,
        )  # fmt: skip


@pytest.mark.parametrize("options", [
    COMPILE,
    ("--parallelism.data_parallel_replicate_degree", "2", "--parallelism.data_parallel_shard_degree", "1"),
    (*COMPILE, "--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op",
     "--checkpoint.async_mode", "async_with_pinned_mem"),
    ("--parallelism.context_parallel_degree", "2"),
    (*COMPILE, "--parallelism.context_parallel_degree", "2", "--activation_checkpoint.mode", "selective",
     "--activation_checkpoint.selective_ac_option", "op"),
], ids=["fsdp-compile", "replicate", "fsdp-compile-ac-pinned", "context", "context-compile-ac"])  # fmt: skip
def test_two_ranks_learn_what_one_does(toy, one, tmp_path, options):
    run = tmp_path / "run"
    toys.launch(toy, run, *MODEL, *options, ranks=2)
    assert_agree(run, one)
    assert [info.step for info in scan(run / "checkpoint") if info.complete][-1] == 8


def test_a_killed_rank_is_started_again(toy, one, tmp_path):
    run = tmp_path / "run"
    process = start(toy, run)
    toys.wait_for(run, "moment step 5 on rank 1", 240)
    os.kill(int(re.findall(r"on rank 1, pid (\d+)", toys.log_of(run))[-1]), signal.SIGKILL)
    assert process.wait(timeout=240) == 0, toys.log_of(run)[-3000:]
    # Under NCCL the other rank waits in a kernel until torchrun kills it too (after 30 s), and cannot say why it ends.
    assert "resumed step 4 of 8" in toys.log_of(run) and "the last launch was killed" in toys.log_of(run)
    assert_agree(run, one)


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_signal_to_one_rank_saves_and_one_gpu_goes_on(toy, one, tmp_path, mode):
    run, options = tmp_path / "run", ("--checkpoint.async_mode", mode)
    process = start(toy, run, *options)
    toys.wait_for(run, "moment step 5 on rank 1", 240)
    os.kill(int(re.findall(r"on rank 1, pid (\d+)", toys.log_of(run))[-1]), signal.SIGUSR1)
    assert process.wait(timeout=240) == 0, toys.log_of(run)[-3000:]
    stop = last_stop(read_events(run))
    assert (stop["reason"], stop["detail"], stop["step"], stop["saved"]) == ("signal", "SIGUSR1", 5, True)
    toys.launch(toy, run, *MODEL, *options)
    assert "resumed step 5 of 8" in toys.log_of(run) and "2 -> 1 ranks" in toys.log_of(run)
    assert_agree(run, one)


def test_a_hanging_rank(toy, one, tmp_path):
    """Rank 1 hangs in step 5: stacks and flight records of both are written, and both are started again."""
    run = tmp_path / "run"
    process = start(toy, run, "--guard.hang_seconds", "10", HANG="1:5", PAUSE="0.01")
    assert process.wait(timeout=400) == 0, toys.log_of(run)[-3000:]
    stacks = [(run / f"stacks/rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "in hang_if_asked" in stacks[1] and "in hang_if_asked" not in stacks[0]
    assert list((run / "stacks").glob("rank-0.*.json")), list((run / "stacks").iterdir())
    assert "the last launch hung: no sign of life" in toys.log_of(run)
    assert_agree(run, one)

"""What is refused before anything starts, the command itself, and the order of things in a step."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from tests.toy import REPO, arguments, log_of, records, train
from torchtitan_deltaproduct.errors import ConfigError, DataError
from torchtitan_deltaproduct.titan.run import is_lost_peer, is_machine_fault


def test_missing_data(toy, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        train(toy, tmp_path / "run", "--data.paths", "nowhere")
    assert not (tmp_path / "run").exists()


def test_vocabulary_too_small(toy, tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)token ids up to 319.*model.vocab_size = 300 \(command line\).*320"):
        train(toy, tmp_path / "run", "--model.vocab_size", "300")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("error", "lost"), [
    (TimeoutError("rank 0 waited 300 s for rank 3 to start"), True),
    (RuntimeError("[../gloo/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete"), True),
    (RuntimeError("[/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:5"), True),
    (RuntimeError("The size of tensor a (3) must match"), False),
    (OSError(28, "No space left on device"), False),
])  # fmt: skip
def test_a_lost_peer(error, lost):
    assert is_lost_peer(error) is lost


@pytest.mark.parametrize(("error", "fault"), [
    (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), True),
    (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
    (torch.OutOfMemoryError("CUDA out of memory."), False),
    (OSError(errno.ESTALE, "Stale file handle"), True), (OSError(errno.ENOSPC, "No space left on device"), False),
    (RuntimeError("The size of tensor a (3) must match"), False),
])  # fmt: skip
def test_a_fault_of_the_machine(error, fault):
    assert is_machine_fault(error) is fault


def test_the_command(toy, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torchtitan_deltaproduct.train"]
    done = subprocess.run(
        [*command, *arguments(toy, run, ("--training.steps", "1"))], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for line in ("device: cpu", "n_h = 2, eigenvalues in [-1, 1]", "step: 4 sequences of 64 = 256 tokens (2 a rank x 2",
                 "prepared data:", "validation data:", "step 1/1", "finished: step 1 of 1"):  # fmt: skip
        assert line in done.stdout, (line, done.stdout)
    assert "\033[" not in done.stdout
    assert (run / "config.json").exists() and len(records(run)) == 3


INTERRUPTED = """
import builtins, os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # A suite run in the background has it ignored.
original, module = builtins.__import__, sys.argv.pop(1)
def interrupted(name, *given, **more):
    if name == "torch" and "torch" not in sys.modules:
        os.kill(os.getpid(), signal.SIGINT)
    return original(name, *given, **more)
builtins.__import__ = interrupted
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(("module", "code", "told"), [
    ("torchtitan_deltaproduct.train", 0, "stopped on SIGINT before step 1: there was nothing new to save"),
    ("launch.node", 130, "interrupted"),
])  # fmt: skip
def test_ctrl_c_while_torch_is_imported(toy, tmp_path, module, code, told):
    command = [sys.executable, "-c", INTERRUPTED, module, str(toy), "--job.dump_folder", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=os.environ | {"NPROC": "1"})
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr[-3000:]
    assert told in done.stdout + done.stderr


NOBODY = """
import pwd, runpy, sys
def unknown(name):
    raise KeyError(f"getpwuid(): uid not found: {name}")
pwd.getpwuid = pwd.getpwnam = unknown
module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("words", [
    ["torchtitan_deltaproduct.train"], ["torchtitan_deltaproduct.plan"],
    ["launch.slurm", "--ranks-per-node", "1", "--dry-run"],
], ids=lambda words: words[0])  # fmt: skip
def test_no_home_and_no_entry_in_passwd(toy, tmp_path, words):
    """As in a container that runs under a number nobody knows."""
    variables = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")}
    module, *options = words
    options += ["--job.dump_folder", str(tmp_path / "run"), "--training.steps", "1"]
    command = [sys.executable, "-c", NOBODY, module, str(toy), *options]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_update_is_launched_before_the_host_waits(toy, tmp_path, monkeypatch):
    """What it waits for was on its way by then: the device works on the update while the host looks at the loss."""
    from torchtitan_deltaproduct.titan import trainer
    from torchtitan_deltaproduct.titan.optimizer import GroupedOptimizers

    to_host, update, order = trainer.to_host, GroupedOptimizers.step, []

    def noted_copy(numbers):
        order.append("copy")
        wait = to_host(numbers)
        return lambda: (order.append("wait"), wait())[1]

    def noted_update(self, skip):
        order.append("update")
        update(self, skip)

    monkeypatch.setattr(trainer, "to_host", noted_copy)
    monkeypatch.setattr(GroupedOptimizers, "step", noted_update)
    train(toy, tmp_path / "run", "--training.steps", "2", "--validation.no-enable", "--checkpoint.no-enable")
    assert order == ["copy", "update", "wait"] * 2


def test_a_wrong_toml_ends_with_two_and_no_traceback(toy, tmp_path):
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(toy.read_text().replace("hidden_size = 32", 'hidden_sizes = 32\nuse_forget_gate = "yes"'))
    done = subprocess.run(
        [sys.executable, "-m", "torchtitan_deltaproduct.train", "--job.config_file", str(wrong)],
        cwd=REPO, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    assert "hidden_size" in done.stderr and "use_forget_gate" in done.stderr and f"{wrong}:" in done.stderr


def test_one_process_prints_a_data_error_under_torchrun(toy, tmp_path):
    options = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    argv = arguments(toy, tmp_path / "run", ("--data.paths", "nowhere"))
    with open(tmp_path / "run.log", "w") as log:
        subprocess.run(
            [sys.executable, *options, "torchtitan_deltaproduct.train", *argv], cwd=REPO, stdout=log, stderr=log
        )
    assert log_of(tmp_path / "run").count("error: ") == 1 and "nowhere" in log_of(tmp_path / "run")

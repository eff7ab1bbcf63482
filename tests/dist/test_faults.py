"""Disks, files and ranks that fail under a run: training goes on, or goes back, and what it learns does not change."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess

import pytest

from tests.dist.test_signals import begin
from tests.processes import run_distributed, start
from tests.toy import (
    arguments,
    assert_close,
    assert_same_weights,
    launch,
    learned,
    log_of,
    records,
    train,
    wait_for,
    weights,
)
from torchtitan_deltaproduct.checkpoint import scan
from torchtitan_deltaproduct.checkpoint.folders import Retention, retire
from torchtitan_deltaproduct.checkpoint.safe_dcp import read_index
from torchtitan_deltaproduct.config import load_config
from torchtitan_deltaproduct.errors import CheckpointError
from torchtitan_deltaproduct.events import last_stop, read_events


@pytest.fixture(scope="module")
def unbroken(toy, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    train(toy, run)
    return run


def of_kind(run, kind):
    return [event for event in read_events(run) if event["event"] == kind]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here: " + mounted.stderr.decode().strip())
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(toy, unbroken, small_disk, monkeypatch, capsys):
    """Full from the first save until step 5: saves fail meanwhile, the training does not."""
    from torchtitan_deltaproduct.titan import trainer

    ballast, original = small_disk / "ballast", trainer.Trainer.train_step

    def step(self, batches):
        if self.step == 2:
            with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
        if self.step == 5:
            ballast.unlink()
        return original(self, batches)

    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    run = small_disk / "run"
    train(toy, run)
    said = capsys.readouterr().out
    assert "No space left on device" in said and "training goes on; the next try is at step 3" in said
    assert [info.step for info in scan(run / "checkpoint") if info.complete] == [5, 6, 8]
    assert [event["step"] for event in of_kind(run, "save")] == [5, 6, 8]
    assert [r["failed_saves"] for r in records(run) if "loss" in r] == [0, 0, 1, 2, 3, 3, 3, 3]
    assert learned(run) == learned(unbroken)
    assert_same_weights(weights(run, 8), weights(unbroken, 8))


def test_a_folder_that_cannot_be_written(toy, tmp_path, monkeypatch):
    """To the end: the run says so with its own error, after it has tried."""
    from torchtitan_deltaproduct.titan import checkpointer

    monkeypatch.setattr(checkpointer, "PAUSE", 0.0)
    run = tmp_path / "run"
    (run).mkdir()
    (run / "checkpoint").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"step 8 could not be saved .* in 3 tries"):
        train(toy, run)
    assert len(of_kind(run, "save_failed")) >= 5
    stop = last_stop(read_events(run))
    assert stop["reason"] == "failed" and "could not be saved" in stop["detail"] and stop["saved"] is False


def failing_writes(rank: int, argv: list[str], steps: tuple[int, ...]) -> None:
    from torchtitan_deltaproduct.checkpoint.writer import MarkedWriter
    from torchtitan_deltaproduct.titan.run import run

    original = MarkedWriter.write_data

    def write_data(self, *given):
        if rank == 1 and self.about.step in steps:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(self, *given)

    MarkedWriter.write_data = write_data
    run(load_config(argv))


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_one_rank_cannot_write(toy, unbroken, tmp_path, mode):
    run = tmp_path / "run"
    run_distributed(failing_writes, 2, (arguments(toy, run, ("--checkpoint.async_mode", mode)), (2,)))
    failed = of_kind(run, "save_failed")
    assert [(event["step"], event["rank"]) for event in failed] == [(2, 1)]
    assert "Input/output error" in failed[0]["error"]
    saved = [(event["step"], event["reason"]) for event in of_kind(run, "save")]
    # A synchronous save is tried again at the next step; of an asynchronous one the next that is due learns.
    expected = [(3, "retry"), (4, "interval")] if mode == "disabled" else [(4, "interval")]
    assert saved == [*expected, (6, "interval"), (8, "last step")]
    assert not (run / "checkpoint/step-2").exists()
    assert_close(run, unbroken)


def test_of_the_ranks_that_are_left_behind_one_says_so(toy, tmp_path):
    run = tmp_path / "run"
    options = ("--training.steps", "100000", "--lr_scheduler.total_steps", "100000", "--validation.no-enable",
               "--training.global_batch_size", "6", "--checkpoint.interval", "1000")  # fmt: skip
    process = launch(toy, run, *options, ranks=3, wait=False)
    wait_for(run, "step     20/100000", 240)
    os.kill(json.loads((run / "heartbeat.json").read_text())["pid"], signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    assert [stop["reason"] for stop in of_kind(run, "stop")] == ["lost_peer"], log_of(run)[-3000:]


def failing_plan(rank: int, argv: list[str], seen: str) -> None:
    """Rank 1 cannot make its folder as step 4 is planned; rank 0 counts the global plans."""
    from torch.distributed.checkpoint import default_planner

    from torchtitan_deltaproduct.checkpoint.writer import MarkedWriter
    from torchtitan_deltaproduct.titan.run import run

    original, global_plan = MarkedWriter.prepare_local_plan, default_planner.create_default_global_save_plan

    def prepare(self, plan):
        if rank == 1 and self.about.step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, plan)

    def count(plans):
        with open(seen, "a", encoding="utf-8") as file:
            print(sum(len(plan.items) for plan in plans), file=file)
        return global_plan(plans)

    MarkedWriter.prepare_local_plan = prepare
    default_planner.create_default_global_save_plan = count
    run(load_config(argv))


def test_a_plan_that_failed_is_not_remembered(toy, unbroken, tmp_path):
    """Ranks remember the plan of a save; after one that failed on some rank they plan anew, and nothing is missing."""
    run, seen = tmp_path / "run", tmp_path / "seen"
    run_distributed(failing_plan, 2, (arguments(toy, run, ()), str(seen)))
    assert [(event["step"], event["rank"]) for event in of_kind(run, "save_failed")] == [(4, 1)]
    assert [event["step"] for event in of_kind(run, "save")] == [2, 5, 6, 8]
    plans = seen.read_text().split()
    assert len(plans) == 2 and len(set(plans)) == 1
    indices = [read_index(run / f"checkpoint/step-{step}") for step in (6, 8)]
    assert indices[0].state_dict_metadata.keys() == indices[1].state_dict_metadata.keys()
    assert_close(run, unbroken)
    assert {*weights(unbroken, 8)} <= {*weights(run, 8)}


def test_asynchronous_saves_take_their_memory_once(toy, unbroken, tmp_path, monkeypatch):
    """After the first step, when nobody waits for a save."""
    from torchtitan_deltaproduct.checkpoint.staging import Stager
    from torchtitan_deltaproduct.titan.checkpointer import CheckpointManager

    blocks, reserve, stage = [], CheckpointManager.reserve, Stager.stage

    def look(manager):
        reserve(manager)
        blocks.append(manager.stager.block)

    def look_again(stager, states):
        staged = stage(stager, states)
        blocks.append(stager.block)
        return staged

    monkeypatch.setattr(CheckpointManager, "reserve", look)
    monkeypatch.setattr(Stager, "stage", look_again)
    run = tmp_path / "run"
    train(toy, run, "--checkpoint.async_mode", "async")
    assert len(blocks) == 4 and all(block is blocks[0] for block in blocks), "steps 1, 2, 4, 6; the last save waits"
    assert [event["step"] for event in of_kind(run, "save")] == [2, 4, 6, 8] and not of_kind(run, "save_failed")
    for step in (6, 8):
        assert_same_weights(weights(run, step), weights(unbroken, step))


def test_the_thread_of_an_asynchronous_save_dies(toy, unbroken, tmp_path, monkeypatch, capsys):
    """An error that is not the writer's: that save is lost and told, the training goes on."""
    from torch.distributed.checkpoint import _async_thread_executor as executor

    original = executor.save_wrapper

    def save_wrapper(*args, **kwargs):
        if (tmp_path / "run/checkpoint/step-2/complete.json").exists():
            monkeypatch.setattr(executor, "save_wrapper", original)
            raise RuntimeError("Checkpoint background process is dead")
        return original(*args, **kwargs)

    monkeypatch.setattr(executor, "save_wrapper", save_wrapper)
    run = tmp_path / "run"
    train(toy, run, "--checkpoint.async_mode", "async")
    assert "step 4 was not saved, on rank 0: Checkpoint background process is dead" in capsys.readouterr().out
    assert [event["step"] for event in of_kind(run, "save")] == [2, 6, 8]
    assert_same_weights(weights(run, 8), weights(unbroken, 8))


def saved_by_processes(rank: int, argv: list[str]) -> None:
    from torchtitan_deltaproduct.titan import checkpointer
    from torchtitan_deltaproduct.titan.run import run

    # Pinned memory and copies beside the computation need CUDA; the rest of the mode is the same.
    finish, signalled = checkpointer.CheckpointManager.finish_running_save, []

    def signal_and_finish(manager):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGUSR1)
            signalled.append(child.pid)
        finish(manager)

    checkpointer.CheckpointManager.finish_running_save = signal_and_finish
    config = load_config(argv)
    config.checkpoint.async_mode = "async_with_pinned_mem"
    run(config)
    assert signalled


@pytest.mark.slow
def test_saves_by_other_processes(toy, tmp_path):
    """As `async_with_pinned_mem` has it; the processes do not die of the cluster's signals."""
    run = tmp_path / "run"
    run_distributed(saved_by_processes, 2, (arguments(toy, run, ()),))
    launch(toy, tmp_path / "unbroken", ranks=2)
    assert [event["step"] for event in of_kind(run, "save")] == [2, 4, 6, 8] and not of_kind(run, "save_failed")
    assert_same_weights(weights(run, 8), weights(tmp_path / "unbroken", 8))
    assert_same_weights(weights(run, 6), weights(tmp_path / "unbroken", 6))


def lost_saver(rank: int, argv: list[str]) -> None:
    """Saves in a process of its own, without the pinned memory that needs a GPU; rank 1 loses it after step 3."""
    from torch.distributed.checkpoint import _async_process_executor as executor

    from torchtitan_deltaproduct.titan import trainer
    from torchtitan_deltaproduct.titan.run import run

    original = trainer.Trainer.train_step

    def step(self, batches):
        if self.step == 4 and rank == 1:
            self.checkpointer.save_future.result()
            executor._CHECKPOINT_PROCESS._save_process.kill()
        return original(self, batches)

    trainer.Trainer.train_step = step
    config = load_config(argv)
    config.checkpoint.async_mode = "async_with_pinned_mem"
    run(config)


@pytest.mark.slow
def test_the_process_of_an_asynchronous_save_dies(toy, unbroken, tmp_path):
    """On one rank: that save is lost, and the next has new processes on all ranks."""
    run = tmp_path / "run"
    run_distributed(lost_saver, 2, (arguments(toy, run, ()),))
    assert {event["step"] for event in of_kind(run, "save_failed")} == {4}
    assert [event["step"] for event in of_kind(run, "save")] == [2, 6, 8]
    assert_close(run, unbroken)


def damage(folder, at=-3000):
    path = next(folder.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_in_the_newest_checkpoint(toy, unbroken, tmp_path, capsys):
    run = tmp_path / "run"
    train(toy, run, "--training.steps", "6")
    damage(run / "checkpoint/step-6")
    train(toy, run)
    said = capsys.readouterr().out
    assert "checkpoint step 6 is damaged and left out: __0_0.distcp is not what was written" in said
    assert "resumed step 4 of 8" in said and of_kind(run, "bad_checkpoint")[0]["step"] == 6
    assert learned(run) == learned(unbroken)
    assert_same_weights(weights(run, 8), weights(unbroken, 8))


def test_nothing_good_is_left(toy, tmp_path):
    run = tmp_path / "run"
    train(toy, run, "--training.steps", "4")
    for step in (2, 4):
        damage(run / f"checkpoint/step-{step}")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be used: step 2, step 4 damaged"):
        train(toy, run)
    with pytest.raises(CheckpointError, match="can be used: step 4 damaged"):
        train(toy, run, "--checkpoint.load_step", "4")
    assert {info.step for info in scan(run / "checkpoint")} == {2, 4}


def test_no_marker_can_be_read(toy, tmp_path):
    """Of a later release, say, or for a fault of the file system: what is there is not trained over."""
    run = tmp_path / "run"
    train(toy, run, "--training.steps", "4")
    for step, (old, new) in {2: ('"version": 1', '"version": 2'), 4: ("format", "for")}.items():
        marker = run / f"checkpoint/step-{step}/complete.json"
        marker.write_text(marker.read_text().replace(old, new))
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be used: step 2, step 4 damaged"):
        train(toy, run)
    # A save that was cut short never was a checkpoint.
    for step in (2, 4):
        retire(run / f"checkpoint/step-{step}")
    train(toy, run)
    assert [info.step for info in scan(run / "checkpoint") if info.complete] == [4, 6, 8]


def test_all_markers_are_gone(toy, tmp_path):
    """What was complete once is not trained over."""
    run = tmp_path / "run"
    train(toy, run, "--training.steps", "4")
    for step in (2, 4):
        (run / f"checkpoint/step-{step}/complete.json").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be used: step 2, step 4 damaged"):
        train(toy, run)
    assert (run / "metrics.jsonl").read_bytes() == before


def spoil(path, make):
    """Puts a folder or a pipe in the place of a file."""
    path.unlink()
    make(path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", ["complete.json", ".metadata", "__0_0.distcp", "config.json"])
def test_what_is_no_file_gives_way_to_the_step_before(toy, unbroken, tmp_path, name, make):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    spoil(run / f"checkpoint/step-8/{name}", make)
    train(toy, run, "--checkpoint.keep_latest_k", "0")
    assert learned(run) == learned(unbroken)
    assert_same_weights(weights(run, 8), weights(unbroken, 8))
    assert len(list((run / "checkpoint").glob("step-8.found-*"))) == (name == "complete.json")


def test_a_tokenizer_that_was_cut_short_is_copied_again(toy, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    whole = (run / "tokenizer/tokenizer.json").read_bytes()
    (run / "tokenizer/tokenizer.json").write_bytes(whole[:1000])
    train(toy, run)
    assert (run / "tokenizer/tokenizer.json").read_bytes() == whole


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "heartbeat.json"])
def test_noise_in_the_files_of_a_run_does_not_end_it(toy, unbroken, tmp_path, name):
    """One bit of every line is flipped, the highest of some byte: no line is UTF-8 any more."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    path = run / name
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"".join(bytes([line[0]]) + bytes([line[1] ^ 128]) + line[2:] + b"\n" for line in lines))
    train(toy, run, "--checkpoint.load_step", "4")
    assert_same_weights(weights(run, 8), weights(unbroken, 8))


@pytest.mark.slow
def test_a_hanging_rank(toy, tmp_path):
    """Rank 1 never ends step 5: both write their stacks and exit, torchrun starts both again."""
    run = tmp_path / "run"
    options = ("--guard.hang_seconds", "8", "--training.local_batch_size", "1")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    module = ["-m", "tests.dist.slow_train", *arguments(toy, run, options)]
    process = start([*torchrun, *module], f"{run}.log", env=os.environ | {"HANG": "1:5", "PAUSE": "0.01"})
    assert process.wait(timeout=400) == 0, log_of(run)[-3000:]
    stacks = [(run / f"stacks/rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "in hang_if_asked" in stacks[1] and "in hang_if_asked" not in stacks[0]
    assert {event["rank"] for event in of_kind(run, "stop") if event["reason"] == "hung"} == {0, 1}
    assert "the last launch hung: no sign of life" in log_of(run)
    launch(toy, tmp_path / "unbroken", *options, ranks=2)
    assert learned(run) == learned(tmp_path / "unbroken")


def test_walltime(toy, unbroken, tmp_path):
    """Stops by itself in time, and the next launch goes on."""
    run = tmp_path / "run"
    limit = ("--guard.walltime_minutes", "1", "--guard.walltime_margin_seconds", "58")
    assert begin(toy, run, *limit).wait(timeout=240) == 0, log_of(run)[-3000:]
    stop = last_stop(read_events(run))
    assert (stop["reason"], stop["detail"], stop["saved"]) == ("walltime", "", True) and stop["step"] < 8
    train(toy, run)
    assert learned(run) == learned(unbroken)
    assert_same_weights(weights(run, 8), weights(unbroken, 8))


def test_a_rank_without_its_siblings_is_refused(toy, tmp_path):
    """Some clusters set RANK for every process."""
    alone = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | {"RANK": "0"}
    words = ["-m", "torchtitan_deltaproduct.train", *arguments(toy, tmp_path / "run", ())]
    assert start(words, f"{tmp_path}/run.log", env=alone).wait() == 2
    assert "error: RANK is set, and LOCAL_RANK, WORLD_SIZE, " in log_of(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_folder_that_cannot_be_listed_fails_no_run(toy, tmp_path, monkeypatch, capsys):
    """Only what retention would delete stays; the last save waits for it."""

    def stale(self):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Retention, "surplus", stale)
    train(toy, tmp_path / "run")
    assert last_stop(read_events(tmp_path / "run"))["reason"] == "finished"
    assert "old checkpoints are not deleted, the folder cannot be read: [Errno 116]" in capsys.readouterr().out

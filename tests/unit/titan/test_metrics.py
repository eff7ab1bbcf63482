"""metrics.jsonl across restarts, the console line, non-finite values."""

import json
import math
import os
from pathlib import Path

import pytest

from tests.toy import records, train
from torchtitan_deltaproduct import history
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.events import read_events
from torchtitan_deltaproduct.history import read_jsonl
from torchtitan_deltaproduct.titan import metrics
from torchtitan_deltaproduct.titan.device import CpuModule
from torchtitan_deltaproduct.titan.metrics import TensorBoard
from torchtitan_deltaproduct.titan.records import RecordFile, restore_history, set_repeated_aside


def write(path, steps, tail="", time=100.0):
    path.write_text("".join(json.dumps({"step": s, "time": time + s}) + "\n" for s in steps) + tail)


def steps_in(path):
    return [record["step"] for record in read_jsonl(path) if "step" in record]


def test_repeated_steps_are_kept(tmp_path):
    path, repeated = tmp_path / "metrics.jsonl", tmp_path / "metrics.repeated.jsonl"
    assert restore_history(path, 3, 200.0) == ""
    write(path, range(6), tail='{"step": 6, "lo')
    said = f"3 records past step 3 (1 lines damaged), which this run repeats, are kept in {repeated}"
    assert restore_history(path, 3, 200.0) == said
    assert steps_in(path) == [0, 1, 2, 3] and steps_in(repeated) == [4, 5]
    assert repeated.read_bytes().endswith(b'{"step": 6, "lo\n')
    assert restore_history(path, 3, 200.0) == ""
    write(path, range(6))
    restore_history(path, 4, 200.0)
    assert steps_in(repeated) == [4, 5, 5]


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_costs_a_line_at_most(tmp_path, bit):
    path = tmp_path / "metrics.jsonl"
    write(path, range(4))
    content = path.read_bytes()
    for at in range(len(content)):
        flipped = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
        path.write_bytes(flipped)
        restore_history(path, 3, 200.0)
        kept, aside = path.read_bytes(), tmp_path / "metrics.repeated.jsonl"
        lost = aside.read_bytes() if aside.exists() else b""
        assert sorted(flipped.splitlines()) == sorted(kept.splitlines() + lost.splitlines()[1:])
        assert len(kept.splitlines()) >= 2
        aside.unlink(missing_ok=True)
        for other in tmp_path.glob("metrics.until-*"):
            raise AssertionError(other)


def test_a_run_that_starts_over_keeps_the_one_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(9))
    before = path.read_bytes()
    said = restore_history(path, 0, math.inf)
    (aside,) = tmp_path.glob("metrics.until-*.jsonl")
    assert said == f"the metrics.jsonl of the run that was here is kept as {aside}"
    assert aside.read_bytes() == before and not path.exists()
    # A try-out in the folder, then the run itself again, from its checkpoint of step 8.
    write(path, range(3), time=500.0)
    said = restore_history(path, 8, 109.0)
    assert said.endswith(f"{aside.name} is metrics.jsonl again") and path.read_bytes() == before
    (other,) = tmp_path.glob("metrics.until-*.jsonl")
    assert steps_in(other) == [0, 1, 2]


def test_no_name_is_taken_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for number in range(3):
        write(path, [number])
        os.utime(path, (1e9, 1e9))
        restore_history(path, 0, math.inf)
    assert sorted(steps_in(aside) for aside in tmp_path.glob("metrics.until-*.jsonl")) == [[0], [1], [2]]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match="is no file"):
        restore_history(tmp_path / "metrics.jsonl", 0, math.inf)


def test_one_record_a_step_in_every_sink(toy, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run = tmp_path / "run"
    train(toy, run, "--training.steps", "4", "--metrics.log_freq", "2", "--checkpoint.keep_latest_k", "0")
    lines = [line.split("step ")[1] for line in capsys.readouterr().out.splitlines() if "grad_norm" in line]
    assert [line.split("/")[0] for line in lines] == ["1", "2", "4"]
    again = ("--checkpoint.load_step", "2", "--checkpoint.keep_latest_k", "0", "--metrics.log_freq", "2")
    train(toy, run, *again)
    steps = [r for r in records(run) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert [r["tokens"] for r in steps] == [4 * 64 * s for s in range(1, 9)]
    assert [r["step"] for r in records(run) if "validation_loss" in r] == [0, 4, 8]
    # One TensorBoard folder for both launches, with the same names and values, step 4 once: the steps with a line.
    board = EventAccumulator(str(run / "tb"))
    board.Reload()
    scalars = {e.step: e.value for e in board.Scalars("loss")}
    assert list(scalars) == [1, 2, 4, 6, 8]
    assert all(abs(scalars[r["step"]] - r["loss"]) < 1e-5 for r in steps if r["step"] in scalars)
    assert [event.step for event in board.Scalars("validation_bits_per_byte")] == [0, 4, 8]
    # What TensorBoard's page HPARAMS reads.
    settings = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = HParamsPluginData.FromString(settings).session_start_info.hparams
    assert shown["optimizer.lr"].number_value == 0.01 and shown["model.num_householder"].number_value == 2
    assert shown["optimizer.name"].string_value == "AdamW" and "lr_scheduler.decay_ratio" not in shown


def test_a_full_disk_costs_records_and_one_warning(tmp_path, caplog):
    full = RecordFile(Path("/dev/full"))
    full.write({"step": 1})
    full.write({"step": 2})
    full.close()
    assert full.lost == 2 and caplog.text.count("cannot be written (No space left on device)") == 1
    file = RecordFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1})
    os.write(file.handle, b'{"step": 2, "lo')
    file.torn = True
    file.write({"step": 3})
    file.close()
    set_repeated_aside(tmp_path / "metrics.jsonl", 9)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 3]


def test_tensorboard_comes_back(tmp_path, monkeypatch, caplog):
    board = TensorBoard(tmp_path / "tb", 0)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board.writer, "add_scalar", fail)
    board.log({"loss": 1.0}, 1)
    assert "cannot be written" in caplog.text and board.writer is None
    board.log({"loss": 1.0}, 2)
    assert board.writer is None
    board.log({"loss": 1.0}, 1 + TensorBoard.RETRY)
    assert board.writer is not None
    board.close()


@pytest.mark.parametrize("damaged", [False, True])
def test_history_is_restored_block_by_block(tmp_path, monkeypatch, damaged):
    """What is moved and what is kept do not depend on where the blocks of the file begin."""
    monkeypatch.setattr(history, "BLOCK", 100)
    path = tmp_path / "metrics.jsonl"
    write(path, range(60))
    before = path.read_bytes().splitlines(keepends=True)
    if damaged:
        before[45] = b"\x00" * 30 + b"\n"
        path.write_bytes(b"".join(before))
    said = restore_history(path, 40, 1e9)
    assert said.startswith(f"19 records past step 40{' (1 lines damaged)' if damaged else ''}, which")
    assert path.read_bytes() == b"".join(before[:41])
    assert (tmp_path / "metrics.repeated.jsonl").read_bytes().splitlines(keepends=True)[1:] == before[41:]
    # A damaged line among those that stay is moved alone.
    before[38] = b"{\n"
    path.write_bytes(b"".join(before[:41]) + before[41])
    restore_history(path, 40, 1e9)
    assert steps_in(path) == [*range(38), 39, 40]


def test_goodput_is_the_share_of_the_time_since_the_first_launch(toy, tmp_path, monkeypatch):
    """Time between two launches counts, and so does that before the first step of each."""
    run = tmp_path / "run"
    train(toy, run, "--training.steps", "4")
    first = records(run)
    assert "goodput" not in first[1] and all(0 < r["goodput"] <= 1 for r in first if r["step"] > 1 and "loss" in r)
    (launch,) = [event for event in read_events(run) if event["event"] == "launch"]
    lines = (run / "events.jsonl").read_text().replace(str(launch["time"]), str(launch["time"] - 10))
    (run / "events.jsonl").write_text(lines)
    train(toy, run)
    last = [r for r in records(run) if "loss" in r][-1]
    speed = max(r["tokens_per_second"] for r in records(run) if r["step"] > 5 and "loss" in r)
    assert math.isclose(last["goodput"], last["tokens"] / speed / (last["time"] - launch["time"] + 10), rel_tol=0.05)


def test_tensorboard_that_cannot_begin_stops_no_run(tmp_path, caplog):
    (tmp_path / "tb").touch()
    board = TensorBoard(tmp_path / "tb", 4)
    assert "tb cannot be written (" in caplog.text and board.writer is None
    (tmp_path / "tb").unlink()
    board.log({"loss": 1.0}, 4 + TensorBoard.RETRY)
    board.close()
    assert list((tmp_path / "tb").iterdir())


def test_wandb_has_one_run_a_folder_named_after_it(tmp_path, monkeypatch):
    opened = []
    for name in ("WANDB_RUN_ID", "WANDB_RUN_NAME", "WANDB_PROJECT", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(metrics.stock, "WandBLogger", lambda *_: opened.append(dict(os.environ)))
    (tmp_path / "outputs/s3").mkdir(parents=True)
    for _ in range(2):
        metrics.wandb_logger(None, tmp_path / "outputs/s3")
        monkeypatch.delenv("WANDB_RUN_ID")
    first, second = opened
    assert first["WANDB_RUN_NAME"] == "outputs/s3" and first["WANDB_PROJECT"] == "torchtitan-deltaproduct"
    assert first["WANDB_RUN_ID"] == second["WANDB_RUN_ID"] == (tmp_path / "outputs/s3/wandb_id").read_text()


def test_memory_that_is_short_is_told_when_it_grows(toy, tmp_path, monkeypatch, capsys):
    """Once for a line on the console, and not again while nothing is added."""
    retries = iter([0, 1, 1, 1, 3, 3, 3, 3])
    stats = CpuModule.memory_stats
    monkeypatch.setattr(CpuModule, "memory_stats", lambda *_: stats(None) | {"num_alloc_retries": next(retries, 3)})
    train(toy, tmp_path / "run", "--metrics.log_freq", "2")
    said = [line.split("memory is short: ")[1] for line in capsys.readouterr().out.splitlines() if "is short" in line]
    assert [line.split()[0] for line in said] == ["1", "3"]
    assert all(r["memory_gib"] > 0 for r in records(tmp_path / "run") if "loss" in r)

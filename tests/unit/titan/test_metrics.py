"""metrics.jsonl across restarts, the console line, non-finite values."""

import json
import os
from pathlib import Path

from tests.toy import records, train
from torchtitan_deltaproduct.titan.metrics import RecordFile, TensorBoard, clock, truncate_records


def write(path, steps, tail=""):
    path.write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in steps) + tail)


def test_truncation(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert truncate_records(path, 3) == 0
    write(path, [0, 1, 2, 3, 4, 5], tail='{"step": 6, "lo')
    assert truncate_records(path, 3) == 3
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    assert truncate_records(path, 3) == 0


def test_clock():
    assert [clock(s) for s in (0, 59.9, 61, 3725, 90000)] == ["0:00:00", "0:00:59", "0:01:01", "1:02:05", "25:00:00"]


def test_one_record_a_step_in_every_sink(toy, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train(toy, run, "--training.steps", "4", "--metrics.log_freq", "2", "--checkpoint.keep_latest_k", "0")
    lines = [line.split("step ")[1] for line in capsys.readouterr().out.splitlines() if "grad_norm" in line]
    assert [line.split("/")[0] for line in lines] == ["1", "2", "4"]
    train(toy, run, "--checkpoint.load_step", "2", "--checkpoint.keep_latest_k", "0")
    steps = [r for r in records(run) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert [r["tokens"] for r in steps] == [4 * 64 * s for s in range(1, 9)]
    assert [r["step"] for r in records(run) if "validation_loss" in r] == [0, 4, 8]
    # One TensorBoard folder for both launches, with the same names and values, steps 3 and 4 once.
    board = EventAccumulator(str(run / "tb"))
    board.Reload()
    scalars = {e.step: e.value for e in board.Scalars("loss")}
    assert list(scalars) == list(range(1, 9))
    assert all(abs(scalars[r["step"]] - r["loss"]) < 1e-5 for r in steps)
    assert "validation_bits_per_byte" in board.Tags()["scalars"]


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
    truncate_records(tmp_path / "metrics.jsonl", 9)
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

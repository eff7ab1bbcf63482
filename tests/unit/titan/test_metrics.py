"""metrics.jsonl across restarts, the console line, non-finite values."""

import json

from tests.toy import records, train
from torchtitan_deltaproduct.titan.metrics import clock, truncate_records


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

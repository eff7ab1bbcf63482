"""Two launches in one run folder: the second is refused and leaves no trace, the first does not notice."""

import signal

from tests.toy import launch, log_of, records, wait_for
from torchtitan_deltaproduct.events import read_events


def test_a_second_launch_is_refused(toy, tmp_path):
    run = tmp_path / "run"
    long = ("--training.steps", "4000", "--lr_scheduler.total_steps", "4000", "--checkpoint.interval", "1000")
    first = launch(toy, run, *long, ranks=2, wait=False)
    wait_for(run, "step    2/4000")
    config = (run / "config.json").read_bytes()
    second = launch(toy, run, "--training.steps", "4", wait=False)
    assert second.wait(timeout=120) == 2
    assert f"{run} is in use by another launch: process" in log_of(run)
    assert (run / "config.json").read_bytes() == config
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    first.wait(timeout=120)
    assert [event["event"] for event in read_events(run)] == ["launch", "save", "stop"]
    assert [r["step"] for r in records(run) if "loss" in r] == list(range(1, records(run)[-1]["step"] + 1))
    assert not (run / "owner").exists()

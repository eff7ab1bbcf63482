"""Who goes back into the queue: every way a job can end."""

import json
import time

import pytest

from launch import requeue

LAUNCH = {"event": "launch", "time": 10.0, "step": 12}


def stop(reason, detail="", saved=True, step=1234):
    return {"event": "stop", "time": 20.0, "step": step, "reason": reason, "detail": detail, "saved": saved}


@pytest.mark.parametrize(("events", "code", "expected", "message"), [
    ([LAUNCH, stop("signal", "SIGUSR1")], 138, True, "signal at step 1,234: SIGUSR1"),
    ([LAUNCH, stop("signal", "SIGTERM", saved=False)], 143, True, "SIGTERM, without a new checkpoint"),
    ([LAUNCH, stop("walltime")], 0, True, "walltime at step 1,234"),
    ([LAUNCH, stop("hung", "no step for 600 s", saved=False)], 1, True, "hung at step 1,234: no step"),
    ([LAUNCH, stop("signal", "SIGINT")], 130, False, "a person stopped it"),
    ([LAUNCH, stop("finished")], 0, False, "finished at step 1,234"),
    ([LAUNCH, stop("finished")], 143, False, "finished"),
    ([LAUNCH, stop("failed", "NonFiniteError: 10 steps")], 1, False, "failed at step 1,234: NonFiniteError"),
    ([stop("failed", "DataError", step=None)], 2, False, "failed before training began: DataError"),
    # The ranks left behind by a failing one fail too; the first says why.
    ([LAUNCH, stop("hung"), stop("failed", "connection closed")], 1, True, "hung"),
    ([LAUNCH, stop("lost_peer", "RuntimeError: Connection closed by peer", saved=False)], 1, True, "lost_peer at"),
    ([LAUNCH, stop("lost_peer"), stop("failed", "ValueError: x")], 1, False, "ValueError"),
    ([LAUNCH, stop("machine", "AcceleratorError: CUDA error: uncorrectable ECC error", saved=False)], 1, True, "ECC"),
    ([LAUNCH, LAUNCH, LAUNCH, stop("machine", saved=False)], 1, False, "3 launches in a row came no further"),
    ([LAUNCH, LAUNCH, LAUNCH, stop("signal", "SIGTERM")], 143, True, "SIGTERM"),
    # torchrun started the ranks again.
    ([LAUNCH, stop("failed", "a bad moment"), LAUNCH, stop("signal", "SIGTERM")], 143, True, "signal"),
    ([LAUNCH, stop("signal", "SIGTERM"), LAUNCH], 137, True, "killed by SIGKILL after step 12"),
    ([LAUNCH], 1, True, "ended with exit code 1 after step 12"),
    ([LAUNCH], 0, False, "exit code 0"),
    ([LAUNCH, LAUNCH], 137, True, "without a word"),
    ([LAUNCH, LAUNCH, LAUNCH], 137, False, "3 launches in a row came no further"),
    ([LAUNCH, LAUNCH, LAUNCH | {"step": 14}], 137, True, "after step 14"),
    ([], 138, True, "killed by SIGUSR1 before training began"),
    ([], 255, True, "killed (exit code 255)"),
    ([], 1, False, "ended with exit code 1 before training began"),
    ([], 0, False, "exit code 0 before"),
    ([stop("signal", "SIGUSR1", saved=False, step=0)], 138, True, "signal at step 0"),
])  # fmt: skip
def test_decide(events, code, expected, message):
    decision, why = requeue.decide(events, 0, 3, code)
    assert (decision, message in why) == (expected, True), why
    # Whatever asks for a requeue gets it N times, and none after.
    assert requeue.decide(events, 2, 3, code)[0] is expected
    last, why = requeue.decide(events, 3, 3, code)
    assert not last and ("requeued 3 times already, of at most 3" in why) is expected
    # What SLURM itself ends, it also requeues or not.
    ended, why = requeue.decide(events, 0, 3, code, ended_by_slurm=True)
    final = bool(events) and events[-1].get("reason") in ("finished", "failed") and "hung" not in str(events)
    assert not ended and ("SLURM ends the job" in why) is not final


@pytest.mark.parametrize(("reason", "slurm", "seconds_left", "code"), [
    ("walltime", "no", None, requeue.REQUEUE),
    ("finished", "no", None, requeue.FINISHED),
    ("failed", "no", None, requeue.END),
    ("signal", "yes", None, requeue.END),
    ("signal", "yes", 3600, requeue.END),
    # The time limit ends a job as well, and nobody wished that.
    ("signal", "yes", -1, requeue.REQUEUE),
])  # fmt: skip
def test_main(tmp_path, monkeypatch, capsys, reason, slurm, seconds_left, code):
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "" if seconds_left is None else str(int(time.time()) + seconds_left))
    # The finish of an earlier start is no word of this one.
    events = [{**stop("finished"), "time": 5.0}, LAUNCH, stop(reason)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    arguments = [str(tmp_path), "--max", "3", "--code", "138", "--since", "9.5", "--ended-by-slurm", slurm]
    assert requeue.main(arguments) == code
    printed = capsys.readouterr().out.strip()
    assert printed.startswith(
        "job 123, requeued 2 times: " + ("requeue: " if code == requeue.REQUEUE else "no requeue: ")
    )
    assert (tmp_path / "launch/requeues.log").read_text().endswith(printed + "\n")
    assert requeue.main([*arguments[:2], "2", *arguments[3:]]) != requeue.REQUEUE


def test_events_before_this_start_do_not_count(tmp_path):
    (tmp_path / "events.jsonl").write_text(json.dumps(stop("signal", "SIGUSR1")) + "\n")
    arguments = [str(tmp_path), "--max", "3", "--code", "1"]
    assert requeue.main([*arguments, "--since", "19.9"]) == requeue.REQUEUE
    assert requeue.main([*arguments, "--since", "20.1"]) == requeue.END


@pytest.mark.parametrize("shift", [-86400, 0, 86400])
def test_a_clock_that_was_set_back(tmp_path, monkeypatch, shift):
    """Between the start of the job and its first event: the launch names the job, so its stop counts."""
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    earlier = [LAUNCH | {"slurm_job": "123", "slurm_restart": 1}, stop("walltime")]
    now = [LAUNCH | {"slurm_job": "123", "slurm_restart": 2}, stop("finished")]
    now = [event | {"time": 1e9 + shift} for event in now]
    lines = [json.dumps(event) for event in earlier + now]
    (tmp_path / "events.jsonl").write_text("\n".join([*lines, '{"event": "loss_spike", "step": 5}', ""]))
    assert requeue.main([str(tmp_path), "--max", "3", "--code", "138", "--since", "1e9"]) == requeue.FINISHED


def test_any_flipped_bit_leaves_a_verdict(tmp_path):
    content = "".join(json.dumps(event) + "\n" for event in [LAUNCH, stop("walltime", "x"), LAUNCH]).encode()
    for at in range(len(content)):
        for bit in range(8):
            flipped = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
            (tmp_path / "events.jsonl").write_bytes(flipped)
            events = requeue.of_this_start(requeue.read_events(tmp_path), 0.0)
            assert isinstance(requeue.decide(events, 0, 3, 143)[0], bool)

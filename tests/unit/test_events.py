"""The run's story: appended whole, read past damage, and what the last launch came to."""

import pytest

from torchtitan_deltaproduct.events import NAME, append, last_stop, read_events, whereabouts


def test_append_and_read(tmp_path):
    append(tmp_path, "launch", step=0, ranks=2)
    with open(tmp_path / NAME, "a") as file:
        file.write('{"event": "stop", "rea\n[1, 2]\n')
    append(tmp_path, "stop", step=4, reason="signal", detail="SIGTERM", saved=True)
    found = read_events(tmp_path)
    assert [event["event"] for event in found] == ["launch", "stop"] and found[1]["detail"] == "SIGTERM"
    assert found[0]["time"] <= found[1]["time"]


def test_a_line_that_was_cut_short_does_not_take_the_next_along(tmp_path):
    (tmp_path / NAME).write_text('{"event": "save", "ti')
    append(tmp_path, "stop", step=4, reason="finished", detail="", saved=True)
    append(tmp_path, "launch", step=4)
    assert [event["event"] for event in read_events(tmp_path)] == ["stop", "launch"]


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    append(tmp_path / "run", "launch")
    assert not (tmp_path / "run").exists() and read_events(tmp_path / "run") == []


LAUNCH, FAILED = {"event": "launch"}, {"event": "stop", "reason": "failed", "rank": 1}
LOST = {"event": "stop", "reason": "lost_peer", "rank": 0}


@pytest.mark.parametrize(("events", "reason"), [
    ([], None),
    ([LAUNCH], None),
    ([LAUNCH, FAILED, LAUNCH], None),
    ([LAUNCH, FAILED, {"event": "stop", "reason": "signal"}], "failed"),
    ([LAUNCH, LOST, FAILED], "failed"),
    ([LAUNCH, FAILED, LOST], "failed"),
    ([LAUNCH, LOST, LOST], "lost_peer"),
    ([LAUNCH, FAILED, LAUNCH, {"event": "save"}, {"event": "stop", "reason": "finished"}], "finished"),
])  # fmt: skip
def test_last_stop(events, reason):
    assert (last_stop(events) or {"reason": None})["reason"] == reason


def test_whereabouts(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert whereabouts()["slurm_job"] == "17" and whereabouts()["slurm_restart"] == 2
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert whereabouts()["slurm_restart"] is None

"""The run's story: appended whole, read past damage, and what the last launch came to."""

import pytest

from torchtitan_deltaproduct.events import (
    LAUNCHED,
    NAME,
    append,
    began,
    began_before,
    last_stop,
    read_events,
    whereabouts,
)


def test_append_and_read(tmp_path):
    append(tmp_path, "launch", step=0, ranks=2)
    with open(tmp_path / NAME, "a") as file:
        file.write('{"event": "stop", "rea\n[1, 2]\n')
        for time in ("NaN", "Infinity", "1e12", '"noon"'):
            file.write(f'{{"event": "launch", "step": 1, "time": {time}}}\n')
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


@pytest.mark.parametrize(("changed", "expected"), [
    ({}, True),
    # Another launch in the allocation of the first.
    ({"SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "b"}, False),
    ({"SLURM_JOB_ID": "18", "TORCHELASTIC_RUN_ID": "b"}, False),
    # torchrun counts restarts on the node that lost a rank, and rank 0 may be of another.
    ({"SLURM_JOB_ID": "18"}, True),
    ({"SLURM_JOB_ID": "18", LAUNCHED: "990.5"}, True),
    ({"SLURM_JOB_ID": "18", LAUNCHED: "1200.5"}, False),  # a later torchrun that was given the same name
    ({"SLURM_JOB_ID": "18", "TORCHELASTIC_RESTART_COUNT": "1"}, True),
    ({"SLURM_JOB_ID": "18", "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "none"}, False),
])  # fmt: skip
def test_a_restart_is_no_launch_of_its_own(monkeypatch, changed, expected):
    given = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "a",
             "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = [{"event": "launch", "step": 4, "time": 1000.0, **whereabouts()}]
    for name, value in ({"SLURM_RESTART_COUNT": "2"} | changed).items():
        monkeypatch.setenv(name, value)
    assert began_before(before, 4) is expected
    assert not began_before(before, 8) and not began_before([before[0] | {"arguments": ["other"]}], 4)


def test_when_a_run_began():
    """Its first launch counts through restarts, and one at step 0 after a save is another run in the same folder."""
    launches = [{"event": "launch", "step": step, "time": time} for step, time in ((0, 10.0), (0, 20.0), (4, 30.0))]
    save = {"event": "save", "step": 4, "time": 25.0}
    assert began([]) is None and began(launches) == 10.0
    assert began([*launches[:2], save, launches[2]]) == 10.0
    assert began([*launches, save, {"event": "launch", "step": 0, "time": 40.0}, save]) == 40.0


def test_of_very_many_events_both_ends_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("torchtitan_deltaproduct.events.LIMIT", 10_000)
    for step in range(2000):
        append(tmp_path, "launch", step=step)
    steps = [event["step"] for event in read_events(tmp_path)]
    assert steps[0] == 0 and steps[-1] == 1999 and steps == sorted(set(steps)) and len(steps) < 1900

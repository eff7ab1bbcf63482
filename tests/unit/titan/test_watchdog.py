"""A process that stops beating writes its stacks, its event, and exits; one that beats lives."""

import json
import subprocess
import sys
import time

import pytest

from tests.toy import REPO
from torchtitan_deltaproduct.events import read_events
from torchtitan_deltaproduct.titan import watchdog
from torchtitan_deltaproduct.titan.watchdog import EXIT_HUNG, Watchdog, write_heartbeat

PROGRAM = """
import sys, threading, time
from pathlib import Path
from torchtitan_deltaproduct.titan import watchdog
watchdog.GRACE = 0.2
dog = watchdog.Watchdog(Path(sys.argv[1]), 3, float(sys.argv[2]))
dog.start(7)
def compute_forever():
    {hang}
dog.beat(8, "step")
compute_forever()
"""
SLEEP = "threading.Event().wait()"
# A regular expression holds the interpreter's lock while it backtracks: no Python thread runs.
LOCKED = "import re; re.match('(a*)*b', 'a' * 40)"


def run(tmp_path, hang, seconds="0.8"):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(hang=hang))
    (tmp_path / "run").mkdir()
    command = [sys.executable, str(program), str(tmp_path / "run"), seconds]
    return subprocess.run(command, cwd=REPO, env={"PYTHONPATH": str(REPO), "PATH": "/usr/bin:/bin"},
                          capture_output=True, text=True, timeout=100)  # fmt: skip


def test_a_hang_is_written_down(tmp_path):
    done = run(tmp_path, SLEEP)
    assert done.returncode == EXIT_HUNG and "no sign of life" in done.stderr
    stacks = (tmp_path / "run/stacks/rank-3.txt").read_text()
    assert "rank 3 on " in stacks and "in compute_forever" in stacks and "the step of step 8" in stacks
    event = read_events(tmp_path / "run")[-1]
    assert (event["event"], event["reason"], event["step"], event["saved"]) == ("stop", "hung", 8, False)


def test_a_hang_with_the_interpreter_locked(tmp_path):
    done = run(tmp_path, LOCKED)
    assert done.returncode == 1
    assert "in compute_forever" in (tmp_path / "run/stacks/rank-3.locked.txt").read_text()


def test_beats_keep_it_alive_and_close_leaves_nothing(tmp_path):
    dog = Watchdog(tmp_path, 0, 0.5)
    dog.start(0)
    for step in range(12):
        time.sleep(0.1)
        dog.beat(step, "step")
    dog.close()
    time.sleep(1)
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]


def test_it_is_armed_once_a_second_and_when_its_patience_changes(tmp_path, monkeypatch):
    now, limits = [100.0], []
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda seconds, **_: limits.append(seconds))
    dog = Watchdog(tmp_path, 0, 10)
    dog.start(0)
    for step in range(1, 41):
        now[0] += 0.1
        dog.beat(step, "step")
    dog.close()
    rest = 3 * watchdog.GRACE
    assert limits[0] == 60 + rest and 5 <= len(limits) <= 6 and set(limits[1:]) == {10 + rest}


def test_what_a_locked_rank_wrote_outlives_the_next_launch(tmp_path):
    stacks = tmp_path / "stacks/rank-0.locked.txt"
    stacks.parent.mkdir()
    stacks.write_text("Timeout!\n")
    dog = Watchdog(tmp_path, 0, 10)
    dog.start(0)
    dog.close()
    assert stacks.read_text() == "Timeout!\n"


def test_first_step_may_take_longer(tmp_path):
    dog = Watchdog(tmp_path, 0, 10)
    dog.beat(0, "starting")
    assert dog.limit == 60
    dog.beat(0, "validation batch")
    assert dog.limit == 60
    dog.beat(1, "step")
    assert dog.limit == 10


def test_heartbeat(tmp_path):
    write_heartbeat(tmp_path, 12, "save")
    body = json.loads((tmp_path / "heartbeat.json").read_text())
    assert body["step"] == 12 and body["after"] == "save" and body["pid"] and abs(body["time"] - time.time()) < 5
    write_heartbeat(tmp_path / "nowhere", 1, "step")


@pytest.mark.parametrize("rank", [1, 2])
def test_only_rank_0_writes_it(tmp_path, rank):
    dog = Watchdog(tmp_path, rank, 0)
    dog.beat(1, "step")
    assert not (tmp_path / "heartbeat.json").exists()

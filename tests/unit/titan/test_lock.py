"""One launch a run folder: who is refused, who may take over, and what becomes of an owner that was replaced."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.titan import lock
from torchtitan_deltaproduct.titan.lock import RunLock, identity, is_gone, numbers, start_of


def owner_of(run: Path, **changes) -> Path:
    """Puts an owner's file into a run folder."""
    path = run / "owner" / "7.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(identity() | changes), encoding="utf-8")
    return path


def test_a_second_launch_is_told_who_holds_the_folder(tmp_path):
    with RunLock(tmp_path / "run"):
        assert numbers(tmp_path / "run/owner") == [1]
        with pytest.raises(ConfigError, match=rf"in use by another launch: process {os.getpid()} on \S+ since 20"):
            RunLock(tmp_path / "run").__enter__()
        assert numbers(tmp_path / "run/owner") == [1]
    assert not (tmp_path / "run").exists()


def test_a_killed_owner_gives_way_at_once(tmp_path):
    take = "import os, sys, torchtitan_deltaproduct.titan.lock as lock; lock.RunLock(sys.argv[1]).__enter__()"
    subprocess.run([sys.executable, "-c", f"{take}; os.kill(os.getpid(), 9)", str(tmp_path)])
    assert numbers(tmp_path / "owner") == [1]
    begin = time.monotonic()
    with RunLock(tmp_path):
        assert numbers(tmp_path / "owner") == [2]
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("changes", "own", "gone"),
    [
        ({}, {}, False),
        ({"start": 1}, {}, True),
        ({"pid": 2**22 + 1}, {}, True),
        ({"boot": "another machine"}, {}, None),
        ({"namespace": "pid:[1]"}, {}, None),
        ({"boot": "x", "slurm_job": "5"}, {"slurm_job": "5", "slurm_restart": 1}, True),
        ({"boot": "x", "slurm_job": "5"}, {"slurm_job": "5"}, None),
        ({"boot": "x", "slurm_job": "5"}, {"slurm_job": "6", "slurm_restart": 1}, None),
        ({"boot": "x", "torchrun": "ab"}, {"torchrun": "ab", "torchrun_restart": 2}, True),
        ({"torchrun": "ab"}, {"torchrun": "ab", "torchrun_restart": 2}, False),
        ({"boot": "x", "torchrun": ""}, {"torchrun": "", "torchrun_restart": 2}, None),
    ],
)
def test_who_is_surely_gone(changes, own, gone):
    assert is_gone(identity() | changes, identity() | own) is gone


def test_an_unreadable_owner_is_not_known_to_be_gone():
    assert is_gone({}, identity()) is None


def test_a_zombie_is_gone():
    process = subprocess.Popen([sys.executable, "-c", ""])
    end = time.monotonic() + 20
    while start_of(process.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert start_of(process.pid) == 0
    process.wait()
    assert start_of(process.pid) == 0 and start_of(os.getpid()) > 0


def test_an_owner_elsewhere_is_watched(tmp_path, monkeypatch, caplog):
    """Silent, it is replaced; while its heart beats, it is not."""
    monkeypatch.setattr(lock, "SILENT", 1.0)
    path = owner_of(tmp_path, boot="another machine", host="n7", pid=12)
    with RunLock(tmp_path):
        assert numbers(tmp_path / "owner") == [8]
    assert "held by process 12 on n7" in caplog.text
    path = owner_of(tmp_path, boot="another machine", host="n7")
    beating = multiprocessing.get_context("fork").Process(target=beat, args=(path,), daemon=True)
    beating.start()
    with pytest.raises(ConfigError, match="on n7 since"):
        RunLock(tmp_path).__enter__()
    beating.kill()
    beating.join()


def beat(path: Path) -> None:
    while True:
        os.utime(path)
        time.sleep(0.1)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"pid": "1"}', b"\xff"])
def test_a_damaged_owner_is_watched_like_one_elsewhere(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "SILENT", 0.2)
    owner_of(tmp_path).write_bytes(content)
    with RunLock(tmp_path):
        assert numbers(tmp_path / "owner") == [8]


def test_of_many_that_find_a_dead_owner_one_succeeds(tmp_path):
    owner_of(tmp_path, start=1)
    code = f"""
import sys
from torchtitan_deltaproduct.titan.lock import RunLock
print("ready", flush=True)
sys.stdin.readline()
with RunLock({str(tmp_path)!r}):
    print("mine", flush=True)
    sys.stdin.readline()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(4)]
    assert all(process.stdout.readline() == "ready\n" for process in started)
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.stdout.readline() for process in started]
    ended = [process.communicate("end\n", timeout=60) for process in started]
    assert sorted(answers) == ["", "", "", "mine\n"]
    assert sum("is in use by another launch" in err for _, err in ended) == 3


@pytest.mark.parametrize("what", ["replaced", "moved"])
def test_an_owner_that_was_replaced_or_moved_ends(tmp_path, what):
    run = tmp_path / "run"
    code = f"""
import time
from torchtitan_deltaproduct.titan import lock
lock.BEAT = 0.1
with lock.RunLock({str(run)!r}):
    print("mine", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    if what == "moved":
        run.rename(tmp_path / "elsewhere")
    else:
        (run / "owner/2.json").write_text(json.dumps(identity() | {"host": "n9"}), encoding="utf-8")
    assert process.wait(timeout=20) == lock.EXIT_TAKEN_OVER
    said = process.stderr.read()
    assert ("taken over by process" if what == "replaced" else "its folder was moved or deleted") in said


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_run_folder_that_cannot_be(tmp_path, place):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be written: a file is in the way"):
        RunLock(tmp_path / place).__enter__()


def test_a_full_disk_leaves_no_owner(tmp_path, monkeypatch):
    def full(handle, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        RunLock(tmp_path).__enter__()
    assert numbers(tmp_path / "owner") == []

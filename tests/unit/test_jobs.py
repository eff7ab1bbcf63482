"""Jobs: where they run, which are run, and what is said of those that fail."""

import io
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from torchtitan_deltaproduct import devices, jobs
from torchtitan_deltaproduct.arguments import Parser
from torchtitan_deltaproduct.errors import ConfigError


@dataclass
class Program(jobs.Job):
    """Python code, done when it has made a file."""

    name: str
    folder: Path
    code: str
    why_not: str = ""

    @property
    def command(self):
        return [sys.executable, "-c", self.code]

    @property
    def log(self):
        return self.folder / self.name / "log.txt"

    @property
    def made(self):
        return self.folder / self.name / "made"

    def obstacle(self):
        return self.why_not

    def is_done(self):
        return self.made.exists()


def program(folder, name, code="", **more) -> Program:
    made = folder / name / "made"
    return Program(name, folder, f"import os, pathlib, sys\n{code}\npathlib.Path({str(made)!r}).touch()", **more)


def run(given, places) -> tuple[dict[str, str], str]:
    console = Console(file=io.StringIO(), width=200)
    failed = jobs.run_jobs(given, places, console)
    jobs.report_failures(failed, console)
    return failed, console.file.getvalue()


def test_a_job_that_cannot_be_judged_is_a_failed_job(tmp_path):
    """Its folder was changed under it: the others go on."""

    class Strange(Program):
        def is_done(self):
            if self.made.exists():
                raise ConfigError(f"{self.name} was trained with other settings")
            return False

    made = f"import pathlib\npathlib.Path({str(tmp_path / 'strange/made')!r}).touch()"
    given = [Strange("strange", tmp_path, made), program(tmp_path, "good")]
    failed, printed = run(given, [{}])
    assert failed == {"strange": "strange was trained with other settings"} and given[1].is_done()


def test_a_job_that_cannot_start_is_a_failed_job(tmp_path):
    """A file is in the place of its folder: the others go on, those that run, too."""
    (tmp_path / "file").touch()
    given = [program(tmp_path, "good"), program(tmp_path / "file", "bad"), program(tmp_path, "next")]
    failed, printed = run(given, [{}, {}])
    assert list(failed) == ["bad"] and failed["bad"].startswith("it cannot be started: [Errno 20] Not a directory")
    assert given[0].is_done() and given[2].is_done() and "2/3 bad: it cannot be started" in printed


@pytest.mark.parametrize("option", ["--jobs", "--gpus", "--max-parallel"])
def test_less_than_nothing_is_refused(option, capsys):
    parser = Parser("x", "")
    jobs.add_job_options(parser, jobs=1, jobs_default="1")
    with pytest.raises(SystemExit):
        parser.parse_args([option, "-4"])
    assert f"{option}: -4: expected a whole number of at least 0" in capsys.readouterr().err


def test_what_is_missing_runs_and_what_fails_is_named(tmp_path):
    given = [
        program(tmp_path, "good", "print(os.environ['PLACE'])"),
        program(tmp_path, "bad", "print('x\\nboom'); sys.exit(3)"),
        program(tmp_path, "refused", "print('x\\nerror: a is wrong\\nwrite b'); sys.exit(2)"),
        program(tmp_path, "killed", "os.kill(os.getpid(), 9)"), program(tmp_path, "early", "sys.exit(0)"),
        program(tmp_path, "blocked", why_not="no weights"), program(tmp_path, "made before", "sys.exit(1)"),
    ]  # fmt: skip
    (tmp_path / "made before").mkdir()
    given[-1].made.touch()
    failed, printed = run(given, [{"PLACE": "first"}, {"PLACE": "second"}])
    assert failed == {
        "blocked": "not ready: no weights", "bad": "exit code 3: boom",
        "refused": "exit code 2: error: a is wrong write b", "killed": "SIGKILL: it printed nothing",
        "early": "exit code 0 before its end: it printed nothing",
    }  # fmt: skip
    assert "7 jobs, 1 done already" in printed and "1/5 good: done in" in printed and "    boom" in printed
    assert printed.endswith("  early: exit code 0 before its end: it printed nothing\n")
    assert given[0].log.read_text() == "first\n" and not (tmp_path / "made before/log.txt").exists()


def test_what_follows_a_job_starts_when_that_is_done(tmp_path):
    """Before the jobs that wait, so that what was made is looked at soon; after a failure nothing follows."""
    first = [program(tmp_path, "a"), program(tmp_path, "b", "sys.exit(3)"), program(tmp_path, "c"),
             program(tmp_path, "d", "sys.exit(1)")]  # fmt: skip
    (tmp_path / "d").mkdir()
    first[-1].made.touch()
    names = {job.name: [program(tmp_path, f"after {job.name}")] for job in first}
    console = Console(file=io.StringIO(), width=200)
    failed = jobs.run_jobs(first, [{}], console, lambda job: names.get(job.name, []))
    printed = console.file.getvalue()
    starts = [line.split(" ", 1)[1] for line in printed.splitlines() if line.endswith("...")]
    assert starts == ["a ...", "after a ...", "b ...", "c ...", "after c ...", "after d ..."]
    assert list(failed) == ["b"] and "8 jobs, 1 done already" in printed and not names["b"][0].made.exists()


def test_threads_are_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 64)
    assert [devices.threads(processes) for processes in (1, 8, 16, 999)] == [8, 8, 4, 1]


def test_bars_on_a_terminal(tmp_path, monkeypatch):
    """They show the running jobs and go with them; what failed stays."""
    asked = []
    monkeypatch.setattr(Program, "progress", lambda self: asked.append(self.name) or (3, 7, "half way"))
    console = Console(file=io.StringIO(), width=200, force_terminal=True, highlight=False)
    given = [program(tmp_path, "good", "__import__('time').sleep(1.5)"), program(tmp_path, "bad", "sys.exit(3)")]
    failed = jobs.run_jobs(given, [{}, {}], console)
    printed = console.file.getvalue()
    assert list(failed) == ["bad"] and "3/7" in printed and "half way" in printed
    # At its start, and once a second: a trainer's records are read for it.
    assert asked.count("good") <= 4
    assert "1/2 good: done in" in printed and "2/2 bad: failed with exit code 3" in printed


PATIENT = '''
import io, os, signal, sys, threading, time
from pathlib import Path
from rich.console import Console
from tests.unit.test_jobs import program
from torchtitan_deltaproduct import jobs
signal.signal(signal.SIGINT, signal.default_int_handler)  # A suite run in the background has it ignored.
folder, number = Path(sys.argv[1]), int(sys.argv[2])
code = f"""import signal, time
def save(*_):
    time.sleep(1)
    pathlib.Path({str(folder / "saved")!r}).touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
pathlib.Path({str(folder / "started")!r}).touch()
time.sleep(60)"""
def send():
    while not (folder / "started").exists():
        time.sleep(0.01)
    for _ in range(200):
        os.kill(os.getpid(), number)
        time.sleep(0.002)
threading.Thread(target=send, daemon=True).start()
try:
    jobs.run_jobs([program(folder, "patient", code)], [{}], Console(file=io.StringIO()))
except (KeyboardInterrupt, SystemExit) as end:
    print(type(end).__name__, (folder / "saved").exists())
'''


@pytest.mark.parametrize(("number", "leaves"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "SystemExit")])
def test_a_signal_that_comes_again_and_again_waits_for_the_jobs(tmp_path, number, leaves):
    """Each used to break off the waiting for jobs that save."""
    command = [sys.executable, "-c", PATIENT, str(tmp_path), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == [leaves, "True"], done.stderr


def test_each_place_has_one_job_at_a_time(tmp_path):
    code = "p = pathlib.Path(os.environ['PLACE']); p.mkdir(); __import__('time').sleep(0.3); p.rmdir()"
    given = [program(tmp_path, f"job {number}", code) for number in range(6)]
    failed, _ = run(given, [{"PLACE": str(tmp_path / place)} for place in "ab"])
    assert not failed


@pytest.mark.parametrize(("visible", "at_a_time", "device", "count", "devices", "threads"), [
    ("", 0, "auto", 9, [None] * 8, "1"),
    ("", 2, "auto", 9, [None] * 2, "4"),
    ("", 0, "auto", 1, [None], None),
    ("0,1", 0, "auto", 9, ["0", "1"], "4"),
    ("0,1", 5, "auto", 9, ["0", "1", "0", "1", "0"], "1"),
    ("GPU-7", 0, "auto", 9, ["GPU-7"], None),
    ("0,1", 0, "cpu", 9, [""] * 8, "1"),
    ("0,1", 0, "cpu", 2, [""] * 2, "4"),
    ("0,1", 1, "auto", 9, ["0"], None),
])  # fmt: skip
def test_places(monkeypatch, visible, at_a_time, device, count, devices, threads):
    """On eight cores."""
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda process: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    places = jobs.places_for(at_a_time, device, count)
    assert [place.get("CUDA_VISIBLE_DEVICES") for place in places] == devices
    assert {place.get("OMP_NUM_THREADS") for place in places} == {threads}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert {place.get("OMP_NUM_THREADS") for place in jobs.places_for(2, device, 2)} == {"3"}


def test_places_of_several_gpus(monkeypatch):
    for visible, places in (("0,1,2,3,4", ["0,1", "2,3"]), ("0,1,2,3", ["0,1", "2,3"]), ("5", ["5"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [place["CUDA_VISIBLE_DEVICES"] for place in jobs.places_for(0, "auto", 9, gpus_each=2)] == places


def test_gpus_are_counted_without_torch(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert jobs.visible_gpus() == []
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H100'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert jobs.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert jobs.visible_gpus() == []


def test_only_names_jobs_or_beginnings(tmp_path):
    given = [program(tmp_path, name) for name in ("a/1", "a/2", "ab/1")]
    assert [job.name for job in jobs.chosen(given, ["a"])] == ["a/1", "a/2"]
    assert jobs.chosen(given, []) == given
    with pytest.raises(ConfigError, match="--only b: no such job; there are: a/1, a/2, ab/1"):
        jobs.chosen(given, ["b"])

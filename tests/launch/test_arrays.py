"""Arrays of evaluations: the list, the bounds, and one task; a real array is in test_cluster."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import arrays
from launch.site import Site
from torchtitan_deltaproduct.errors import ConfigError, UserError

COMMANDS = [["python", "-m", "eval.x", f"step-{step}", data] for step in (10, 20, 30) for data in ("wiki text", "code")]


@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_bounds_come_from_the_list(tmp_path, count):
    text = arrays.render_array(COMMANDS[:count], tmp_path, Site(), name="ppl", gpus=1, max_parallel=2)
    assert f"#SBATCH --array=0-{count - 1}%2\n" in text and "#SBATCH --gres=gpu:1\n" in text
    assert "%" not in arrays.render_array(COMMANDS, tmp_path, Site()).split("--array=")[1].splitlines()[0]
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", "-"], input=text, text=True).returncode == 0


def test_submission_writes_the_list(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(arrays, "require_sbatch", lambda: None)
    monkeypatch.setattr(arrays, "submit", lambda script: sent.append(script) or "5")
    assert arrays.submit_array(COMMANDS, tmp_path / "evals", Site()) == "5"
    assert arrays.read_tasks(tmp_path / "evals/tasks.jsonl") == COMMANDS and sent == [tmp_path / "evals/job.sbatch"]
    with pytest.raises(ConfigError, match="an array of no tasks"):
        arrays.submit_array([], tmp_path / "none", Site())
    assert not (tmp_path / "none").exists()


@pytest.fixture
def cluster_of_five(tmp_path, monkeypatch):
    """A cluster whose arrays have five tasks at most."""
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "scontrol": "echo 'MaxArraySize            = 5'",
        "sbatch": f'echo "$2" >>{tmp_path}/sent; wc -l <{tmp_path}/sent',
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return tmp_path


@pytest.mark.parametrize(("count", "bounds"), [
    (5, ["0-4%4"]), (6, ["0-4%2", "0-0%2"]), (12, ["0-4%1", "0-4%1", "0-1%1"])
])  # fmt: skip
def test_more_tasks_than_an_array_may_have(cluster_of_five, count, bounds):
    commands = [["echo", str(number)] for number in range(count)]
    jobs = arrays.submit_array(commands, cluster_of_five / "evals", Site(), max_parallel=4)
    assert jobs == ",".join(str(number + 1) for number in range(len(bounds)))
    numbers = []
    for script, bound in zip((cluster_of_five / "sent").read_text().split(), bounds, strict=True):
        text = Path(script).read_text()
        assert f"#SBATCH --array={bound}\n" in text
        # What each task of the array would run.
        last = text.splitlines()[-1].replace("exec ", "echo ")
        for index in range(int(bound.split("-")[1].split("%")[0]) + 1):
            shell = ["bash", "-c", f"SLURM_ARRAY_TASK_ID={index}; {last}"]
            done = subprocess.run(shell, capture_output=True, text=True)
            numbers.append(int(done.stdout.split()[-1]))
    assert numbers == list(range(count))


def test_a_refused_array_is_told_with_the_limit(cluster_of_five):
    refusal = "sbatch: error: Batch job submission failed: Invalid job array specification"
    (cluster_of_five / "bin/sbatch").write_text(f"#!/bin/sh\necho '{refusal}' >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"(?s)Invalid job array specification\n.*MaxArraySize.*at most 5$"):
        arrays.submit_array(COMMANDS, cluster_of_five / "evals", Site())


@pytest.mark.parametrize("name", ["a\nb", "a\rb"])
def test_a_name_that_would_be_a_line_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="the array's name = .* holds"):
        arrays.render_array(COMMANDS, tmp_path, Site(), name=name)
    with pytest.raises(ConfigError, match="its folder = .* holds"):
        arrays.render_array(COMMANDS, tmp_path / name, Site())


@pytest.fixture
def tasks(tmp_path):
    path = tmp_path / "tasks.jsonl"
    code = "import os, sys; print('in', *sys.argv[1:], flush=True); sys.exit(3) if sys.argv[1] == 'bad' else None; "
    code += "sys.argv[1] == 'killed' and os.kill(os.getpid(), 9)"
    names = ["good one", "bad", "killed"]
    path.write_text("".join(json.dumps([sys.executable, "-c", code, name]) + "\n" for name in names))
    return str(path)


@pytest.mark.parametrize(("number", "code", "told"), [
    (0, 0, ""), (1, 3, "task 1 of 0-2 failed with exit code 3: "), (2, 137, "task 2 of 0-2 failed with SIGKILL: "),
])  # fmt: skip
def test_one_task(tasks, capfd, number, code, told):
    assert arrays.main([tasks, str(number)]) == code
    said = capfd.readouterr()
    assert said.out.startswith(f"task {number} of 0-2: {sys.executable} -c ") and "\nin " in said.out
    assert said.err.startswith(told) and bool(said.err) is bool(told)


@pytest.mark.parametrize(("words", "told"), [
    (["3"], "has tasks 0 to 2"), (["x"], "usage: "), ([], "usage: "), (["0", "1"], "usage: "),
])  # fmt: skip
def test_wrong_numbers(tasks, words, told):
    with pytest.raises(ConfigError, match=told):
        arrays.main([tasks, *words])


@pytest.mark.parametrize(("text", "told"), [
    ('["a"]\n"b"\n', "tasks.jsonl:2: expected a list of words"), ("[]\n", "tasks.jsonl:1"), ("{", "not a list of"),
    ('[["a"], 1]\n', "tasks.jsonl:1"), (None, "No such file"), ('["nonsuch-program"]', "nonsuch-program: No such file"),
])  # fmt: skip
def test_wrong_files(tmp_path, text, told):
    if text is not None:
        (tmp_path / "tasks.jsonl").write_text(text)
    with pytest.raises(UserError, match=told):
        arrays.main([str(tmp_path / "tasks.jsonl"), "0"])

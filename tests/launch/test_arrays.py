"""Arrays of evaluations: the list, the bounds, and one task; a real array is in test_cluster."""

import json
import shutil
import subprocess
import sys

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

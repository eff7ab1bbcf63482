"""Every command in the README exists and takes the arguments it is shown with."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.processes import completed
from tests.toy import REPO
from torchtitan_deltaproduct.config import load_config
from torchtitan_deltaproduct.config.load import Environment

README = (REPO / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line]


def test_length():
    assert len(README.splitlines()) <= 200


def test_the_commands_are_found():
    assert len(COMMANDS) >= 10 and COMMANDS[:2] == ["bash launch/quickstart.sh", "bash launch/test.sh"]


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    words = shlex.split(command)
    if words[:2] == ["pip", "install"]:
        (extra,) = re.findall(r"\[([\w-]+)\]", command)
        assert extra in tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        return
    if words[0] == "bash":
        subprocess.run(["bash", "-n", words[1]], cwd=REPO, check=True)
        check_config([word for word in words[2:] if word.endswith(".toml")])
        return
    assert words[0] == "python"
    target = words[1:3] if words[1] == "-m" else words[1:2]
    options = words[len(target) + 1 :]
    check_config([word for word in options if word.startswith("train_configs/") and "/claims/" not in word])
    if words[1] == "-m":
        code, shown = completed([*target, "--help"])
    else:
        done = subprocess.run([sys.executable, *target, "--help"], cwd=REPO, capture_output=True, text=True)
        code, shown = done.returncode, done.stdout + done.stderr
    assert code == 0, shown[-1000:]
    for option in options:
        assert not option.startswith("--") or option in shown, f"{option} is not an option of {target}"


def check_config(paths):
    for path in paths:
        load_config(["--job.config_file", str(REPO / path)], Environment())


PATHS = re.findall(r"[`(]((?:train_configs|launch|tests|benchmarks|eval|docs)/[\w/.]+)[`)]", README)


@pytest.mark.parametrize("path", PATHS)
def test_path(path):
    assert Path(REPO, path).exists()


def test_the_python_example():
    import torch

    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    scope = {"tokens": torch.zeros(1, 8, dtype=torch.int64)}
    exec(code, scope)
    assert scope["logits"].shape == (1, 8, 32_000)

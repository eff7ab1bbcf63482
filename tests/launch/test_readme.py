"""Every command in the README exists and takes the arguments it is shown with."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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
    if words[0] == "bash":
        subprocess.run(["bash", "-n", words[1]], cwd=REPO, check=True)
        return
    if words[0] == "torchrun":
        assert words[3:5] == ["-m", "torchtitan_deltaproduct.train"]
        load_config([w if not w.endswith(".toml") else str(REPO / w) for w in words[5:]], Environment())
        return
    target = words[1:3] if words[1] == "-m" else words[1:2]
    options = words[len(target) + 1 :]
    shown = subprocess.run([sys.executable, *target, "--help"], cwd=REPO, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-1000:]
    for option in options:
        assert not option.startswith("--") or option in shown.stdout, f"{option} is not an option of {target}"


@pytest.mark.parametrize("path", re.findall(r"`((?:train_configs|launch|tests|benchmarks)/[\w/.]+)`", README))
def test_path(path):
    assert Path(REPO, path).exists()


def test_the_python_example():
    import torch

    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    scope = {"tokens": torch.zeros(1, 8, dtype=torch.int64)}
    exec(code, scope)
    assert scope["logits"].shape == (1, 8, 32_000)

"""The quick start, shortened to three steps: real corpus, tokenizer, shards, torchrun, report; then again."""

import os
import re
import subprocess
import sys

import pytest

from tests.toy import REPO

SHORT = ["--training.steps", "3", "--lr_scheduler.warmup_steps", "1", "--validation.steps", "2",
         "--training.local_batch_size", "2", "--training.global_batch_size", "2"]  # fmt: skip


def quickstart(folder, ranks: str, *options: str) -> subprocess.CompletedProcess:
    if not (folder / "train_configs").exists():
        (folder / "train_configs").symlink_to(REPO / "train_configs")
    environment = os.environ | {"PYTHONPATH": str(REPO), "NPROC": ranks, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch.quickstart", *SHORT, *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_from_nothing_and_again(tmp_path):
    first = quickstart(tmp_path, "1")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    for line in ("step 3/3", "held-out loss", "token frequencies alone give", "tokens a second", "where", "next"):
        assert line in first.stdout
    (page,) = re.findall(r"a page of it +(.*)", first.stdout)
    assert "<svg" in (tmp_path / page).read_text()
    second = quickstart(tmp_path, "2", "--training.steps", "4", "--lr_scheduler.total_steps", "4",
                        "--training.local_batch_size", "1")  # fmt: skip
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-2000:]
    assert "already prepared" in second.stdout and "resumed step 3" in second.stdout
    assert "FSDP2 over 2 ranks" in second.stdout and "step 4/4" in second.stdout


@pytest.mark.parametrize("wrong", [["--training.step", "3"], ["--model.num_householder", "two"]])
def test_a_wrong_option_is_said_before_any_work(tmp_path, wrong):
    done = quickstart(tmp_path, "1", *wrong)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert wrong[0].split(".")[1] in done.stderr and not (tmp_path / "outputs").exists()

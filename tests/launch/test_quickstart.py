"""The quick start, of three steps on a part of the corpus: tokenizer, shards, torchrun, report; then again."""

import re
import shutil
import sys
import sysconfig
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import quickstart
from tests.processes import completed, popen
from tests.toy import REPO

SHORT = ["--training.steps", "3", "--lr_scheduler.warmup_steps", "1", "--validation.steps", "2",
         "--training.local_batch_size", "2", "--training.global_batch_size", "2"]  # fmt: skip
PACKAGES = ("asyncio", "email", "http", "importlib", "multiprocessing", "unittest", "xml")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the configs, as the repository has them."""
    (tmp_path / "train_configs").symlink_to(REPO / "train_configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here, monkeypatch, capsys):
    """Runs the quick start on some packages of the library; its commands are forked, but for torchrun."""
    paths = sysconfig.get_paths()
    for package in PACKAGES:
        shutil.copytree(Path(paths["stdlib"], package), here / "library" / package)
    (here / "library/idlelib").mkdir()
    (here / "library/idlelib/left_out.py").write_text("print()")
    monkeypatch.setattr(quickstart.sysconfig, "get_paths", lambda: paths | {"stdlib": str(here / "library")})
    for name, value in {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "20000", "PYTHONPATH": str(REPO)}.items():
        monkeypatch.setenv(name, value)

    def run(ranks: str, *options: str) -> str:
        monkeypatch.setenv("NPROC", ranks)
        monkeypatch.setattr(sys, "argv", ["quickstart", *SHORT, *options])
        with open(here / f"{ranks}.log", "w+") as log:
            monkeypatch.setattr(quickstart, "subprocess", SimpleNamespace(Popen=partial(popen, stdout=log, stderr=log)))
            try:
                quickstart.main()
            except SystemExit:
                log.seek(0)
                pytest.fail(log.read()[-4000:])
            log.seek(0)
            return capsys.readouterr().out + log.read()

    return run


def test_from_nothing_and_again(here, run):
    first = run("1")
    for line in ("step 3/3", "held-out loss", "token frequencies alone give", "tokens a second", "where", "next"):
        assert line in first
    assert (here / "outputs/quickstart/data/corpus/asyncio/events.py").is_file()
    assert not (here / "outputs/quickstart/data/corpus/idlelib").exists()
    (page,) = re.findall(r"a page of it +(.*)", first)
    assert "<svg" in (here / page).read_text()
    second = run("2", "--training.steps", "4", "--lr_scheduler.total_steps", "4", "--training.local_batch_size", "1")
    assert "already prepared" in second and "resumed step 3" in second
    assert "FSDP2 over 2 ranks" in second and "step 4/4" in second


@pytest.mark.parametrize("wrong", [["--training.step", "3"], ["--model.num_householder", "two"]])
def test_a_wrong_option_is_said_before_any_work(here, wrong):
    code, printed = completed(["-m", "launch.quickstart", *SHORT, *wrong], cwd=here)
    assert code == 2 and "Traceback" not in printed
    assert wrong[0].split(".")[1] in printed and not (here / "outputs").exists()

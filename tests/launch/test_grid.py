"""Grids with runs of two steps: planned, trained, evaluated, told in one table, gone on with, and stopped."""

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import pytest

from launch import grid
from tests import processes
from tests.processes import Process
from tests.unit.evaluation.words_toy import write_toml
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.events import last_stop, read_events
from torchtitan_deltaproduct.history import read_metrics

pytestmark = pytest.mark.usefixtures("forked_jobs")

TOML = """
base = "s3.toml"
out = "{folder}/out"
device = "cpu"
[vary]
"model.num_householder" = [1, 2]
[state_tracking]
words = 20
"""


@pytest.fixture
def toml(tmp_path):
    """Two settings, seed 1."""
    write_toml(tmp_path / "s3.toml")
    file = tmp_path / "paper.toml"
    file.write_text(TOML.format(folder=tmp_path))
    return file


def test_settings_are_products_of_lists_behind_named_tables(toml):
    text = toml.read_text().replace("[vary]", '[vary]\n"optimizer.lr" = [0.1, 0.01]')
    toml.write_text(f"seeds = [3, 4]\n{text}\n[settings.low.model]\nallow_neg_eigval = false\n[settings.high]\n")
    planned = grid.read_grid(toml, [], "", ["--training.steps", "3"])
    assert len(planned.runs) == 2 * 2 * 2 * 2 and not planned.as_written
    run = planned.runs[0]
    assert run.name == "low_lr-0.1_num_householder-1/seed-3" and run.config.training.steps == 3
    assert (run.config.model.allow_neg_eigval, run.config.optimizer.lr, run.config.debug.seed) == (False, 0.1, 3)
    assert planned.runs[-1].config.model.allow_neg_eigval and planned.runs[-1].seed == 4
    assert {run.seed for run in grid.read_grid(toml, [7], "", []).runs} == {7}
    toml.write_text(toml.read_text() + "seeds = [4, 5]\n")
    seeds = [run.seed for run in grid.read_grid(toml, [], "", []).runs if run.name.startswith("high_lr-0.1_num_h")]
    assert seeds == [4, 4, 5, 5]


@pytest.mark.parametrize(("old", "new", "message"), [
    ("[vary]", "[varry]", r"paper.toml:5: \[varry\]: no such table; nearest: 'vary'"),
    ("[1, 2]", "1", r'paper.toml:5: \[vary\] "model.num_householder": expected a list of values'),
    ("[1, 2]", "[1, 0]", r"setting num_householder-0: .*num_householder 0"),
    ("num_householder", "num_householders", "nearest: --model.num_householder"),
    ('"cpu"', '"gpu"', "device = \"gpu\": expected \"auto\" or \"cpu\""),
    ('base = "s3.toml"', "seeds = [1.5]", "seeds: expected a list of whole numbers"),
    ('base = "s3.toml"', "seeds = []", "seeds: expected a list of whole numbers, one at least"),
    ("words = 20", "words = 20\n[settings.n1]\nseeds = []", r"\[settings.n1\] seeds: expected .*, one at least"),
    ('base = "s3.toml"', 'base = "s3.toml"\nranks = true', "ranks: expected a whole number"),
    ('base = "s3.toml"', 'base = "s3.toml"\nranks = "2"', "ranks: expected a whole number"),
    ("words = 20", 'words = 20\n[settings.n1]\n"training.steps" = 2020-01-01', "2020-01-01.*expected a whole number"),
    ("s3.toml", "s3\\u0000.toml", "a text holds a NUL character"),
    ("words = 20", "words = 20\n[settings.n1]\nseeds = 2", r"\[settings.n1\] seeds: expected a list of whole numbers"),
    ('base = "s3.toml"', "", r"\[settings.*expected a table, and a base"),
    ("s3.toml", "s4.toml", "s4.toml: no such file"),
    ("words = 20", "wrods = 20", r"\[state_tracking\]: unrecognized arguments: --wrods 20"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_training(toml, old, new, message):
    toml.write_text(toml.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        grid.main([str(toml)])
    assert not (toml.parent / "out").exists()


def test_trains_evaluates_tells_and_reuses(toml, capsys):
    out = toml.parent / "out"
    assert grid.main([str(toml), "--seeds", "1", "2", "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "8 jobs, 0 done already" in printed and "num_householder-2/seed-2: done in" in printed
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(result["setting"], result["seed"]) for result in results] == [
        ("num_householder-1", 1), ("num_householder-2", 1), ("num_householder-1", 2), ("num_householder-2", 2)
    ]  # fmt: skip
    assert {"loss", "solved", "accuracy at the tested length"} <= results[0]["metrics"].keys()
    table = (out / "results.md").read_text()
    assert "| num_householder-2 | 2 |" in table and "| 0 of 2 (0 to 66 %) |" in table
    compared = json.loads((out / "eval/state_tracking/compared/state_tracking.json").read_text())
    assert [len(setting["runs"]) for setting in compared["settings"]] == [2, 2]
    assert (out / "eval/state_tracking/compared/state_tracking.png").stat().st_size > 10_000
    kept = (out / "results.jsonl").read_bytes()
    # Of other seeds results are kept, under other settings nothing is overwritten by nothing.
    assert grid.main([str(toml), "--collect", "--seeds", "7"]) == 1
    assert (out / "results.jsonl").read_bytes() == kept and "2 of 6 runs are not done" in capsys.readouterr().out
    assert grid.main([str(toml), "--collect", "--seeds", "2"]) == 0
    assert sorted((out / "results.jsonl").read_text().splitlines()) == sorted(kept.decode().splitlines())
    assert grid.main([str(toml), "--collect", "--seeds", "7", "--optimizer.lr", "0.1"]) == 1
    assert "no run is finished under these settings" in capsys.readouterr().out
    # In a copy the evaluations are those of another folder.
    shutil.copytree(out, out.parent / "copy")
    assert grid.main([str(toml), "--collect", "--seeds", "1", "2", "--out", str(out.parent / "copy")]) == 1
    note = "4 evaluations of finished runs (--dry-run says which) are not done."
    assert note in " ".join(capsys.readouterr().out.split())
    assert grid.main([str(toml), "--dry-run", "--out", str(out.parent / "copy")]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert printed.count("to run again: its results are of another command or of other weights") == 2
    # Without its evaluations a grid is not done.
    shutil.rmtree(out.parent / "copy/eval")
    assert grid.main([str(toml), "--collect", "--only", "num_householder-1", "--out", str(out.parent / "copy")]) == 1
    assert grid.main([str(toml), "--only", "num_householder-1"]) == 0
    assert "2 jobs, 2 done already" in capsys.readouterr().out
    # By a version that did not have an option of this one, and had another.
    for file in out.glob("num_householder-1/seed-1/checkpoint/*/config.json"):
        file.write_text(file.read_text().replace('"beta1"', '"betaX"'))
    assert grid.read_grid(toml, [], "", []).runs[0].is_done()
    # Nor does a run that is longer begin with one of other settings, or of another schedule.
    for longer in [], ["--training.steps", "1000", "--lr_scheduler.total_steps", "1000"]:
        with pytest.raises(ConfigError, match="trained to step .* with other settings: .*optimizer.lr: 0.0003 -> 0.1"):
            grid.main([str(toml), "--optimizer.lr", "0.1", *longer])
    with pytest.raises(ConfigError, match="another model"):
        grid.main([str(toml), "--model.head_dim", "4"])


@pytest.mark.slow
def test_a_run_of_another_schedule_is_not_gone_on_from(toml):
    """A try-out of few steps has decayed; of the same rates it is the beginning of the longer run."""
    constant = ("--only", "num_householder-1", "--lr_scheduler.warmup_steps", "0", "--lr_scheduler.decay_ratio")
    assert grid.main([str(toml), *constant, "1.0", "--training.steps", "2"]) == 0
    with pytest.raises(ConfigError, match=r"trained to step 2 with other settings: training.steps: 2 -> 4 \("):
        grid.main([str(toml), *constant, "1.0", "--training.steps", "4"])
    assert grid.main([str(toml), "--out", str(toml.parent / "flat"), *constant, "0.0", "--training.steps", "2"]) == 0
    assert grid.main([str(toml), "--out", str(toml.parent / "flat"), *constant, "0.0", "--training.steps", "4"]) == 0


def test_a_run_is_done_when_its_last_step_is_validated(toml):
    """A signal had broken the validation off, after the checkpoint: the restart makes up for it."""
    words = [str(toml), "--only", "num_householder-1", "--validation.enable", "--validation.freq", "1"]
    assert grid.main(words) == 0
    run = grid.read_grid(toml, [], "", words[3:]).runs[0]
    metrics = run.folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    assert '"step": 2, "validation_loss"' in lines[-1] and '"step": 1, "validation_loss"' in lines[-3]
    metrics.write_text("".join(lines[:-1]))
    assert not run.is_done() and "validation_loss" not in run.final
    # Weights alone cannot be gone on from.
    weights_only = replace(run.config.checkpoint, last_save_model_only=True)
    assert replace(run, config=replace(run.config, checkpoint=weights_only)).is_done()
    assert grid.main(words) == 0 and run.is_done()
    # A number that is none is none, not that of the step before.
    metrics.write_text("".join(lines[:-1]) + '{"step": 2, "validation_loss": null}\n')
    (result,) = grid.summarise(grid.read_grid(toml, [], "", words[3:])).results
    assert result.metrics["validation loss"] is None and result.metrics["loss"] > 0


@pytest.mark.slow  # With stand-ins for the runs: tests/unit/test_jobs.py.
def test_a_failed_run_is_named_and_the_others_are_trained(toml, capsys):
    """The folder of the first run is a file."""
    (toml.parent / "out").mkdir()
    (toml.parent / "out/num_householder-1").mkdir()
    (toml.parent / "out/num_householder-1/seed-1").mkdir()
    (toml.parent / "out/num_householder-1/seed-1/checkpoint").touch()
    assert grid.main([str(toml), "--jobs", "2"]) == 1
    printed = capsys.readouterr().out
    assert "num_householder-2/seed-1: done" in printed
    last = printed.partition("1 of the jobs is not done:\n")[2]
    assert last.startswith("  num_householder-1/seed-1: exit code ") and len(last.splitlines()) == 1
    assert "1 of 2 runs are not done" in (toml.parent / "out/results.md").read_text()


def start(toml, *words: str) -> subprocess.Popen | Process:
    """The command in a process group of its own, with its runs, which last until they are stopped."""
    return processes.start(["-m", "launch.grid", str(toml), "--jobs", "2", *words], toml.parent / "grid.log")


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


SCHEDULE = ("--lr_scheduler.total_steps", "100000")
LONG = (*SCHEDULE, "--training.steps", "100000", "--metrics.log_freq", "1")


@pytest.mark.parametrize("number", [
    signal.SIGINT, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGKILL, signal.SIGTERM))
], ids=lambda number: number.name)  # fmt: skip
def test_stopped_runs_save_and_go_on(toml, number):
    """Ctrl-C reaches the runs too; SIGTERM the grid alone; and a grid that is killed takes its runs along."""
    runs = [toml.parent / f"out/num_householder-{n}/seed-1" for n in (1, 2)]
    toml.write_text(toml.read_text().partition("[state_tracking]")[0])
    process = start(toml, *LONG)
    until(lambda: all(read_metrics(run) for run in runs))  # each has made a step
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(timeout=120) == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number)
    until(lambda: all(last_stop(read_events(run)) for run in runs))
    for stop in (last_stop(read_events(run)) for run in runs):
        assert (stop["reason"], stop["saved"]) == ("signal", True) and stop["step"] > 0
    steps = [last_stop(read_events(run))["step"] for run in runs]
    assert grid.main([str(toml), "--jobs", "2", *SCHEDULE, "--training.steps", str(max(steps) + 1)]) == 0
    launches = [[event for event in read_events(run) if event["event"] == "launch"] for run in runs]
    assert [events[-1]["step"] for events in launches] == steps


def test_as_an_array(toml, stand_in, capsys, monkeypatch):
    stand_in(sbatch="echo 42")
    monkeypatch.chdir(toml.parent)
    seeds = ["--seeds", "1", "--training.steps", "3"]
    assert grid.main([str(toml), "--slurm", "--gpus", "1", "--time=1:00:00", *seeds]) == 0
    printed = capsys.readouterr().out
    assert f"job 42: 2 tasks; tail -f {toml.parent}/out/slurm/001/42_0.out\n" in printed
    assert f"when they are done: python -m launch.grid {toml} --seeds 1 --training.steps 3\n" in printed
    tasks = [json.loads(line) for line in (toml.parent / "out/slurm/001/tasks.jsonl").read_text().splitlines()]
    assert tasks == [run.command for run in grid.read_grid(toml, [], "", seeds[2:]).runs]
    assert "--array=0-1" in (toml.parent / "out/slurm/001/job.sbatch").read_text()

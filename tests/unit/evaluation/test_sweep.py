"""Sweeps: what is wrong with a TOML, what runs, what is left alone, and what is collected."""

import csv
import json
import os
import re
import shutil
import signal
import stat
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from eval import sweep
from tests import toy as toys
from tests.toy import REPO
from tests.unit.evaluation.words_toy import write_toml as write_words
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.evaluation import length_extrapolation, lm_harness, state_tracking
from torchtitan_deltaproduct.evaluation.files import read_results
from torchtitan_deltaproduct.evaluation.sweep.collect import collect
from torchtitan_deltaproduct.evaluation.sweep.plan import read_sweep
from torchtitan_deltaproduct.evaluation.swept import checkpoint_of

pytestmark = pytest.mark.usefixtures("forked_jobs")

TOML = """
out = "{out}"
[models]
late = "{run}"
early = {{ path = "{run}", step = 4 }}
[data]
held-out = "{data}/validation"
[length_extrapolation]
length = 96
sequences = 2
documents = "packed"
[effective_rank]
models = ["late"]
length = 64
sequences = 2
"""


@pytest.fixture
def toml(toy, toy_run, tmp_path):
    """Two models, one dataset, three jobs."""
    path = tmp_path / "paper.toml"
    path.write_text(TOML.format(out=tmp_path / "out", run=toy_run, data=toy.parent / "data"))
    return path


def test_jobs(toml, toy_run, capsys):
    jobs = {job.name: job for job in read_sweep(toml).jobs}
    assert list(jobs) == ["length_extrapolation/late/held-out", "length_extrapolation/early/held-out",
                           "effective_rank/late/held-out"]  # fmt: skip
    early = jobs["length_extrapolation/early/held-out"].command
    assert early[1:6] == ["-m", "eval.length_extrapolation", str(toy_run), "--step", "4"] and "--length" in early
    assert sweep.main([str(toml), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("to run") == 3 and "--sequences 2 --documents packed" in printed
    assert not (toml.parent / "out").exists()


def test_run_resume_collect(toml, capsys):
    out, text = toml.parent / "out", toml.read_text()
    # The folder is the job's: what another dataset of the same name left in it does not stand in the way.
    for data in ("/train", "/validation"):
        toml.write_text(text.replace("/validation", data))
        assert sweep.main([str(toml), "--only", "length_extrapolation/early"]) == 0
        assert "1 jobs, 0 done already" in capsys.readouterr().out
    # What is finished does not run again.
    assert sweep.main([str(toml)]) == 0
    printed = capsys.readouterr().out
    assert "3 jobs, 1 done already" in printed and "2/2 effective_rank/late/held-out: done" in printed
    rows = {(r["eval"], r["model"]): r for r in map(json.loads, (out / "results.jsonl").read_text().splitlines())}
    assert len(rows) == 3 and rows["length_extrapolation", "early"]["checkpoint"].startswith("step 4, saved")
    with (out / "results.csv").open(newline="") as stream:
        cells = [(row["eval"], row["model"], row["value"]) for row in csv.DictReader(stream)]
    assert [(*names, float(value) if value else None) for *names, value in cells] == [
        (*names, value) for names, row in rows.items() for value in row["metrics"].values()
    ]
    for model in ("early", "late"):
        (entry,) = read_results(out / f"length_extrapolation/{model}/held-out/length_extrapolation.json")
        assert (
            rows["length_extrapolation", model]["metrics"]["perplexity to 96"]
            == entry["buckets"][-1]["running_perplexity"]
        )
    table = (out / "results.md").read_text()
    assert "## length extrapolation, held-out" in table and "| early |" in table and "rank at 64" in table
    for name in ("length_extrapolation/compared/held-out/length_extrapolation.png",
                 "effective_rank/compared/held-out/effective_rank.png"):  # fmt: skip
        assert (out / name).stat().st_size > 10_000
    assert sweep.main([str(toml), "--collect"]) == 0
    # Another option makes its jobs due again, and only those.
    toml.write_text(toml.read_text().replace("length = 96", "length = 97"))
    capsys.readouterr()
    sweep.main([str(toml), "--dry-run"])
    printed = capsys.readouterr().out
    assert printed.count("to run") == 2 and printed.count("done") >= 1
    assert sweep.main([str(toml), "--collect"]) == 1
    assert "2 of 3 jobs are not done" in (out / "results.md").read_text()


def test_what_fails_does_not_stop_the_rest(toml, capsys):
    toml.write_text(toml.read_text().replace("early = { path", "gone = { path").replace("step = 4", "step = 5")
                    .replace("validation", "nowhere"))  # fmt: skip
    assert sweep.main([str(toml), "--only", "length_extrapolation"]) == 1
    printed = capsys.readouterr().out
    assert "late/held-out: failed with exit code 2" in printed and "nowhere" in printed
    assert "gone/held-out: not ready" in printed and "no complete step 5" in printed


def test_as_an_array(toml, monkeypatch, capsys):
    """sbatch is a script that says 42: what it is handed is in the folder."""
    programs = toml.parent / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text("#!/bin/sh\necho 42\n")
    (programs / "sbatch").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.chdir(toml.parent)
    assert sweep.main([str(toml), "--slurm", "--time", "1:00:00"]) == 0
    assert "job 42: 3 tasks" in capsys.readouterr().out
    tasks = [json.loads(line) for line in (toml.parent / "out/slurm/001/tasks.jsonl").read_text().splitlines()]
    assert [task[-1] for task in tasks] == [job.name for job in read_sweep(toml).jobs]
    assert "--array=0-2" in (toml.parent / "out/slurm/001/job.sbatch").read_text()


@pytest.mark.parametrize(("old", "new", "printed"), [
    ("[models]", "[modells]", r"paper.toml:3: \[modells\]: no such table; nearest: 'models'"),
    ('models = ["late"]', 'models = ["lat"]', r"'lat' is not in \[models\]; nearest: 'late'"),
    ("length = 96", "lenght = 96", r"\[length_extrapolation\]: unrecognized arguments: --lenght 96"),
    ("length = 96", "length = 0", r"\[length_extrapolation\]: --length 0: must be at least 1"),
    ("length = 96", 'out = "x"', "the sweep sets it"),
    ("step = 4", 'step = "4"', r"\[models\] early: expected"),
    ("[data]\n", "[data]\nx = 3\n", r"\[data\] x: expected what --data takes"),
    ("[effective_rank]", "[lm_harness]", r"expected tasks ="),
    ("[effective_rank]", "[state_tracking]\ndata = []", "this eval reads none"),
    ("[models]", "[models", "not valid TOML"),
    ('out = "', "out = 5 #", "out: expected the path of a folder"),
])  # fmt: skip
def test_wrong_sweeps(toml, old, new, printed):
    toml.write_text(toml.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=printed):
        sweep.main([str(toml)])


def test_nothing_to_do(toml, tmp_path):
    toml.write_text(toml.read_text().partition("[length_extrapolation]")[0])
    with pytest.raises(ConfigError, match="nothing to do"):
        sweep.main([str(toml)])
    with pytest.raises(ConfigError, match="No such file"):
        sweep.main([str(tmp_path / "no.toml")])


def test_a_file_that_is_no_text_and_an_out_that_is_no_folder(toml, tmp_path):
    (tmp_path / "latin.toml").write_bytes(b'[models]\na = "\xe9"\n')
    with pytest.raises(ConfigError, match="is not UTF-8 text: .* at byte 14"):
        sweep.main([str(tmp_path / "latin.toml")])
    (tmp_path / "file").touch()
    toml.write_text(re.sub(r"(?m)^out = .*", f'out = "{tmp_path}/file"', toml.read_text()))
    with pytest.raises(ConfigError, match="a file is in the way"):
        sweep.main([str(toml)])


def test_no_such_job(toml):
    with pytest.raises(ConfigError, match="--only late: no such job; there are: length_extrapolation/late/held-out"):
        sweep.main([str(toml), "--only", "late"])


def test_the_example_is_one():
    assert [job.name for job in read_sweep(REPO / "eval/example_sweep.toml").jobs] == [
        "length_extrapolation/quickstart/stdlib", "effective_rank/quickstart/stdlib",
    ]  # fmt: skip


def test_a_checkpoint_is_the_same_in_every_time_zone(toy_run, monkeypatch):
    told = set()
    try:
        for zone in ("Pacific/Auckland", "America/Los_Angeles"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            told.add(checkpoint_of(toy_run, 4))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert len(told) == 1 and told.pop().startswith("step 4, saved")


def test_a_mark_before_the_text_and_home(toml, toy_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(toy_run)
    toml.write_text(toml.read_text().replace(f'late = "{toy_run}"', 'late = "~/run"'), encoding="utf-8-sig")
    jobs = read_sweep(toml).jobs
    assert len(jobs) == 3 and jobs[0].model.path == str(tmp_path / "run") and not jobs[0].obstacle()


@pytest.mark.parametrize("name", ["lr=1e-2,wd=0.1", "60"])
def test_lm_eval_of_a_path_with_commas_or_a_bare_number(toy_run, tmp_path, monkeypatch, name):
    pytest.importorskip("lm_eval")
    from lm_eval import tasks

    shutil.copytree(toy_run, tmp_path / name)
    (tmp_path / "tests").symlink_to(REPO / "tests")
    monkeypatch.chdir(tmp_path)
    Path("s.toml").write_text(
        f'out = "out"\n[models]\nA = {{ path = "{name}", step = 4 }}\n'
        '[lm_harness]\ntasks = "py_choice"\ninclude_path = "tests/lm_tasks"\nlimit = 2\n'
    )
    (job,) = read_sweep(Path("s.toml")).jobs
    # lm-eval reads its 14,000 task files for 8 seconds each time; here only ours.
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(sys, "argv", job.command[2:])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    lm_harness.main()
    ((_, metrics),) = collect(read_sweep(Path("s.toml")))
    assert job.is_done() and "py_choice acc" in metrics


def test_the_results_say_themselves_whether_a_job_is_done(toml, toy_run):
    """No second book: what the eval itself wrote into its folder, by hand or by a sweep, is looked at."""
    (job,) = (job for job in read_sweep(toml).jobs if job.name == "length_extrapolation/early/held-out")
    assert not job.is_done()
    length_extrapolation.main(job.words)
    assert job.is_done() and sorted(path.name for path in job.folder.iterdir()) == [
        "length_extrapolation", "length_extrapolation.csv", "length_extrapolation.json", "length_extrapolation.png",
    ]  # fmt: skip
    results = json.loads((job.folder / "length_extrapolation.json").read_text())
    assert results["made_by"] == {"arguments": job.words, "checkpoints": [job.model.checkpoint]}
    length_extrapolation.main([*job.words, "--buckets", "3"])
    assert not job.is_done()
    results["made_by"]["checkpoints"] = ["step 4, saved 2026-01-01 00:00:00 UTC"]
    (job.folder / "length_extrapolation.json").write_text(json.dumps(results))
    assert not job.is_done()


def test_state_tracking_in_a_sweep(tmp_path):
    toys.train(write_words(tmp_path / "s3.toml"), tmp_path / "s3")
    toml = tmp_path / "words.toml"
    toml.write_text(f'out = "{tmp_path}/out"\n[models]\nS3 = "{tmp_path}/s3"\n[state_tracking]\nwords = 8\n')
    (job,) = read_sweep(toml).jobs
    state_tracking.main(job.words)
    ((_, metrics),) = collect(read_sweep(toml))
    assert job.is_done() and metrics["solved"] == 0 and 0 <= metrics["accuracy at the tested length"] <= 1

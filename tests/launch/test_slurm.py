"""python -m launch.slurm up to the submission, with a stand-in for sbatch; the real one is in test_cluster."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm
from launch.sbatch import ROOT, new_folder
from tests.toy import REPO
from torchtitan_deltaproduct.config.snapshots import versions
from torchtitan_deltaproduct.errors import ConfigError, UserError, exit_on_user_error


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """An empty folder to submit from, and a run folder in it; no site TOML of this machine is found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DELTAPRODUCT_SITE", raising=False)
    return tmp_path


@pytest.fixture
def stand_ins(bench, stand_in):
    """sbatch that takes everything as job 77, and squeue that prints the file `queue`."""
    (bench / "queue").touch()
    stand_in(sbatch='echo "$@" >>sbatch.log; echo "77;cluster"', squeue="cat queue")
    return bench


def words(toy, *more: str) -> list[str]:
    return [str(toy), "--nodes", "2", "--ranks-per-node", "1", "--job.dump_folder", "run", *more]


def test_dry_run_prints_and_writes_nothing(toy, bench, capsys):
    slurm.main(words(toy, "--dry-run", "--training.max_norm", "0.5", "--time", "2:00:00"))
    printed = capsys.readouterr()
    assert printed.out.startswith("#!/bin/bash\n# toy on 2 nodes x 1 rank")
    assert f"--job.config_file {bench}/run/launch/001/toy.toml" in printed.out
    assert "    --training.max_norm 0.5 || code=$?\n" in printed.out and "--time=2:00:00" in printed.out
    assert "site TOML: none" in printed.err and list(bench.iterdir()) == []
    subprocess.run(["bash", "-n"], input=printed.out, text=True, check=True)


def test_a_file_that_is_not_there_is_told_before_ranks_are_asked_for(toy, bench):
    with pytest.raises(ConfigError, match="nope.toml: no such file"):
        slurm.main(["nope.toml"])
    with pytest.raises(ConfigError, match="how many ranks"):
        slurm.main([str(toy)])


@pytest.mark.parametrize(("more", "message"), [
    (["--training.stepz", "3"], "--training.stepz 3: no such option; nearest: --training.steps"),
    (["--ranks-per-node", "3"], "global_batch_size = 4: must be a multiple of local_batch_size x 6 ranks = 12"),
    (["--gpus-per-node", "2"], "--gpus-per-node, one rank a GPU, or --ranks-per-node"),
    (["--time", "1"], "time limit 1: the ranks are told to save 300 s before it"),
    (["--time", "soon"], "--time soon: expected a time as sbatch takes it"),
    (["--site", "nowhere.toml"], "--site nowhere.toml: no such file"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_written(toy, bench, more, message):
    with pytest.raises(ConfigError) as caught:
        slurm.main(words(toy, *more))
    assert message in str(caught.value) and list(bench.iterdir()) == []


@pytest.mark.parametrize("more", [
    ["--job-name", "a\n#SBATCH --x"], ["--dependency", "afterany:1\r"], ["--job.dump_folder", "run\nrm -rf x"],
    ["--model.flavor", "a\nb"],
])  # fmt: skip
def test_a_value_that_would_be_a_command_leaves_nothing(toy, stand_ins, more):
    before = sorted(stand_ins.rglob("*"))
    with pytest.raises(ConfigError, match="which a script cannot"):
        slurm.main(words(toy, *more))
    assert sorted(stand_ins.rglob("*")) == before


def test_ranks_must_be_given(toy, bench, capsys):
    with pytest.raises(ConfigError, match="how many ranks"):
        slurm.main([str(toy), "--dry-run"])
    (bench / "site.toml").write_text("gpus_per_node = 2")
    slurm.main([str(toy), "--dry-run"])
    assert "--gres=gpu:2" in capsys.readouterr().out


def test_without_slurm(toy, bench, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(lambda: slurm.main(words(toy)))
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and "no sbatch on this machine" in printed and "--dry-run" in printed
    assert "bash launch/local.sh" in printed and not (bench / "run").exists()


def test_what_a_launch_leaves(toy, stand_ins, capsys):
    """All files of RUN/launch/001, and a job that reads the copy of the TOML."""
    slurm.main(words(toy, "--training.max_norm", "0.5"))
    folder = stand_ins / "run/launch/001"
    assert (stand_ins / "sbatch.log").read_text() == f"--parsable {folder}/job.sbatch\n"
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"submitted job 77 on 2 nodes x 1 rank: {folder}/job.sbatch", f"tail -f {folder}/77.out"]
    assert (folder / "77.out").read_text() == "" and (folder / "toy.toml").read_text() == toy.read_text()
    overrides = ["--job.dump_folder", "run", "--training.max_norm", "0.5"]
    assert json.loads((folder / "overrides.json").read_text()) == overrides
    environment = json.loads((folder / "env.json").read_text())
    assert environment["command"].startswith("python -m launch.slurm ") and environment["versions"]["torch"]
    assert any(line.startswith("torch==") for line in (folder / "packages.txt").read_text().splitlines())
    if (REPO / ".git").exists():
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True).stdout
        assert (folder / "git.txt").read_text().startswith(revision.strip())


def test_the_job_runs_a_copy_of_the_code(toy, stand_ins, capsys):
    """Editing the checkout changes nothing queued; the copy knows its revision, and comes before the current folder."""
    slurm.main(words(toy))
    code = stand_ins / "run/launch/001/code"
    printed = capsys.readouterr().err
    assert f"code: {code} (a copy, made now), revision " in printed
    assert {path.name for path in code.iterdir()} == {"torchtitan_deltaproduct", "launch", "eval", "REVISION"}
    for name in ("torchtitan_deltaproduct/train.py", "launch/requeue.py", "eval/generate.py"):
        assert (code / name).read_bytes() == (REPO / name).read_bytes()
    lines = (stand_ins / "run/launch/001/job.sbatch").read_text().splitlines()
    exports = "\n".join(line for line in lines if line.startswith("export PYTHON"))
    show = 'import launch, torchtitan_deltaproduct.config.snapshots as s; print(launch, s, s.versions()["git"])'
    shell = ["bash", "-c", f"{exports}\n{sys.executable} -c '{show}'"]
    done = subprocess.run(shell, cwd=REPO, capture_output=True, text=True)
    for text in (code / "launch/__init__.py", code / "torchtitan_deltaproduct/config/snapshots.py", versions()["git"]):
        assert str(text) in done.stdout, done.stderr
    slurm.main(words(toy, "--no-snapshot", "--dry-run"))
    printed = capsys.readouterr()
    assert f"export PYTHONPATH={ROOT}$" in printed.out and "the checkout, as it is when the job starts" in printed.err


@pytest.mark.parametrize(("answer", "job"), [
    ("-----\n   Welcome to cluster 3\n--> Verifying queue (normal)...OK\n519605", "519605"),
    ("519605;two", "519605"), ("12 nodes are down\n519605\n", "519605"),
])  # fmt: skip
def test_a_banner_is_not_the_job(toy, stand_ins, stand_in, capsys, answer, job):
    stand_in(sbatch=f"cat <<'END'\n{answer}\nEND")
    slurm.main(words(toy))
    assert f"submitted job {job} on" in capsys.readouterr().out
    (stand_ins / "queue").write_text(f"{job} PENDING\n")
    with pytest.raises(UserError, match=f"job {job} is PENDING"):
        slurm.main(words(toy))


def test_an_answer_without_a_job_is_said(toy, stand_ins, stand_in):
    stand_in(sbatch="echo Welcome")
    with pytest.raises(UserError, match="its answer names no job: 'Welcome'"):
        slurm.main(words(toy))
    # What such a launch left is no job to wait for.
    (stand_ins / "run/launch/001/job_id").write_text("Welcome to cluster 3\n")
    stand_in(sbatch="echo 5", squeue="exit 9")
    slurm.main(words(toy))


def test_one_job_a_run(toy, stand_ins):
    slurm.main(words(toy))
    (stand_ins / "queue").write_text("77 RUNNING\n")
    with pytest.raises(UserError, match=r"(?s)job 77 is RUNNING in .*/run already.*--dependency afterany:77"):
        slurm.main(words(toy))
    assert not (stand_ins / "run/launch/002").exists()
    slurm.main(words(toy, "--dependency", "afterany:77"))
    assert "#SBATCH --dependency=afterany:77" in (stand_ins / "run/launch/002/job.sbatch").read_text()


def test_a_refusal_is_passed_on(toy, stand_ins, stand_in):
    stand_in(sbatch="echo 'sbatch: error: invalid partition' >&2; exit 1")
    with pytest.raises(UserError, match=r"(?s)sbatch refused .*job.sbatch:.*invalid partition"):
        slurm.main(words(toy))


def test_missing_data_is_a_warning(toy, bench, capsys):
    """The nodes may see what this machine does not."""
    slurm.main(words(toy, "--dry-run", "--data.paths", "elsewhere"))
    assert "warning: There is no folder elsewhere" in capsys.readouterr().err


def test_folders_count_up(tmp_path):
    assert [new_folder(tmp_path / "launch").name for _ in range(3)] == ["001", "002", "003"]
    (tmp_path / "launch/010").mkdir()
    (tmp_path / "launch/requeues.log").touch()
    assert new_folder(tmp_path / "launch") == Path(tmp_path, "launch/011")


def test_a_file_where_the_launches_should_be(tmp_path):
    (tmp_path / "launch").touch()
    with pytest.raises(ConfigError, match="launch/001 cannot be made: Not a directory"):
        new_folder(tmp_path / "launch")

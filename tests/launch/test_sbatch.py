"""The sbatch files: a training job in full and what changes it; arrays, their list, their bounds and one task.

Real jobs are in test_cluster.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from launch import sbatch
from launch.sbatch import TrainingJob, render
from launch.site import Site, read_site
from tests.toy import REPO
from torchtitan_deltaproduct.errors import ConfigError, UserError

GOLDEN = Path(__file__).with_name("job.sbatch")
JOB = TrainingJob(
    config=Path("/runs/392M/launch/003/dp.toml"),
    overrides=["--optimizer.lr", "1e-4", "--compile.enable", "--data.paths", "['/data/a b', '/data/c']"],
    run=Path("/runs/392M"), folder=Path("/runs/392M/launch/003"), workdir=Path("/home/me/torchtitan-deltaproduct"),
    code=Path("/runs/392M/launch/003/code"),
    nodes=2, ranks_per_node=8, gpus_per_node=8, name="dp",
)  # fmt: skip


def test_golden():
    """Written anew with: python -m tests.launch.test_sbatch"""
    assert rendered() == GOLDEN.read_text()


def rendered() -> str:
    return render(JOB, read_site(REPO / "launch/site_example.toml"))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("site", [
    Site(), Site(container="apptainer exec --nv x.sif", rdzv_host="10.0.0.1"), Site(setup=["module load 'a b'"])
])  # fmt: skip
def test_shellcheck(site):
    done = subprocess.run(["shellcheck", "-"], input=render(JOB, site), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_nothing_said_nothing_asked():
    text = render(JOB, Site())
    for option in ("partition", "account", "qos", "constraint", "time", "mem", "cpus-per-task", "dependency"):
        assert f"--{option}" not in text
    assert "#SBATCH --gres=gpu:8" in text
    assert "--gres" not in render(replace(JOB, gpus_per_node=0), Site())


def test_values_with_blanks_and_percents():
    text = render(replace(JOB, folder=Path("/r/50% done"), workdir=Path("/w/5% x"), name="a b"), Site())
    assert '#SBATCH --chdir="/w/5% x"' in text
    assert '#SBATCH --output="/r/50%% done/%j.out"' in text and '#SBATCH --job-name="a b"' in text


def test_a_container_goes_before_python_everywhere():
    text = render(JOB, Site(container="apptainer exec --nv image.sif"))
    assert "  apptainer exec --nv image.sif \\\n  python -m launch.torchrun" in text
    assert "srun --nodes=1 --ntasks=1 apptainer exec --nv image.sif python -m launch.requeue" in text


def test_options_of_the_command_line():
    job = replace(JOB, time="30", dependency="afterany:12", max_requeues=2, max_restarts=0)
    text = render(job, Site(time="24:00:00", rdzv_host="127.0.0.1", signal_seconds=60))
    for line in ("--time=30\n", "#SBATCH --dependency=afterany:12\n", "--max 2 ", "--max-restarts=0 ", "on 2 nodes x 8",
                 "first=127.0.0.1\n", "#SBATCH --signal=USR1@60\n", "SHUTDOWN_TIMEOUT=54\n", "--wait=54 "):  # fmt: skip
        assert line in text, line


def test_one_node_needs_no_meeting():
    text = render(replace(JOB, nodes=1), Site())
    assert "--standalone --nproc-per-node=8" in text and "endpoint" not in text and "rdzv" not in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


BREAKS = ["\n#SBATCH --x", "\rrm", "\x00", "\x1b[2J", "\x85", "\u2028", "\udc80"]


@pytest.mark.parametrize("bad", BREAKS)
@pytest.mark.parametrize(("field", "name"), [
    ("config", "the TOML's name"), ("run", "job.dump_folder"), ("workdir", "the current folder"), ("time", "--time"),
    ("folder", "the launch's folder"), ("code", "the code's folder"), ("name", "--job-name"),
    ("dependency", "--dependency"),
])  # fmt: skip
def test_a_value_that_would_be_a_command_is_refused_by_name(field, name, bad):
    value = getattr(JOB, field)
    with pytest.raises(ConfigError, match=f"^{name} = .*holds "):
        render(replace(JOB, **{field: type(value)(f"{value}{bad}")}), Site())


def test_the_folder_that_holds_it_is_blamed():
    """All that lies in such a folder holds it too."""
    run = Path("/work/line\nbreak")
    folder = run / "launch/001"
    with pytest.raises(ConfigError, match="^job.dump_folder = "):
        render(replace(JOB, run=run, folder=folder, code=folder / "code", config=folder / "x.toml"), Site())


@pytest.mark.parametrize("bad", BREAKS)
def test_overrides_and_the_site_too(bad):
    with pytest.raises(ConfigError, match="^an override = "):
        render(replace(JOB, overrides=["--model.flavor", f"x{bad}"]), Site())
    for field, value in {"gres": f"gpu:{{gpus}}{bad}", "mem": bad, "extra": [f"--x={bad}"], "env": {"A": bad}}.items():
        with pytest.raises(ConfigError, match=f"^{field} of the site TOML = "):
            render(JOB, replace(Site(), **{field: value}))


def test_every_text_of_a_job_is_looked_at():
    """A field that is added to TrainingJob is checked too, or fails here."""
    texts = [field.name for field in fields(TrainingJob) if not isinstance(getattr(JOB, field.name), int)]
    for field in texts:
        value = getattr(JOB, field)
        with pytest.raises(ConfigError, match="holds"):
            render(replace(JOB, **{field: ["a\nb"] if isinstance(value, list) else type(value)("a\nb")}), Site())


@pytest.mark.parametrize("value", ['a" --wrap="id', "a\\"])
def test_a_value_that_would_end_its_quotes_is_refused(value):
    with pytest.raises(ConfigError, match="no quotation mark or backslash"):
        render(replace(JOB, name=value), Site())


COMMANDS = [["python", "-m", "eval.x", f"step-{step}", data] for step in (10, 20, 30) for data in ("wiki text", "code")]


@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_bounds_come_from_the_list(tmp_path, count):
    text = sbatch.render_array(range(count), tmp_path, Site(), name="ppl", gpus=1, max_parallel=2)
    assert f"#SBATCH --array=0-{count - 1}%2\n" in text and "#SBATCH --gres=gpu:1\n" in text
    assert "%" not in sbatch.render_array(range(6), tmp_path, Site()).split("--array=")[1].splitlines()[0]
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", "-"], input=text, text=True).returncode == 0


def test_submission_writes_the_list(tmp_path, stand_in):
    stand_in(sbatch='echo "$@" >sent; echo 5')
    assert sbatch.submit_array(COMMANDS, tmp_path / "evals", Site()) == ("5", tmp_path / "evals/001")
    assert (tmp_path / "sent").read_text() == f"--parsable {tmp_path}/evals/001/job.sbatch\n"
    # Another submission leaves an array that is queued as it is.
    assert sbatch.submit_array(COMMANDS[:1], tmp_path / "evals", Site()) == ("5", tmp_path / "evals/002")
    assert sbatch.read_tasks(tmp_path / "evals/001/tasks.jsonl") == COMMANDS
    with pytest.raises(ConfigError, match="an array of no tasks"):
        sbatch.submit_array([], tmp_path / "none", Site())
    assert not (tmp_path / "none").exists()


@pytest.fixture
def cluster_of_five(tmp_path, stand_in):
    """A cluster whose arrays have five tasks at most."""
    stand_in(scontrol="echo 'MaxArraySize            = 5'", sbatch='echo "$2" >>sent; wc -l <sent')
    return tmp_path


@pytest.mark.parametrize(("count", "bounds"), [
    (5, ["0-4%4"]), (6, ["0-4%2", "0-0%2"]), (12, ["0-4%1", "0-4%1", "0-1%1"])
])  # fmt: skip
def test_more_tasks_than_an_array_may_have(cluster_of_five, count, bounds):
    commands = [["echo", str(number)] for number in range(count)]
    jobs, _ = sbatch.submit_array(commands, cluster_of_five / "evals", Site(), max_parallel=4)
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


def test_a_refused_array_is_told_with_the_limit(cluster_of_five, stand_in):
    stand_in(sbatch="echo 'sbatch: error: Batch job submission failed: Invalid job array specification' >&2; exit 1")
    with pytest.raises(UserError, match=r"(?s)Invalid job array specification\n.*MaxArraySize.*at most 5$"):
        sbatch.submit_array(COMMANDS, cluster_of_five / "evals", Site())


def test_a_refused_name_leaves_no_folder(cluster_of_five):
    with pytest.raises(ConfigError, match="the array's name"):
        sbatch.submit_array(COMMANDS, cluster_of_five / "evals", Site(), name="a\nb")
    assert not (cluster_of_five / "evals").exists()


@pytest.mark.parametrize("name", ["a\nb", "a\rb"])
def test_a_name_that_would_be_a_line_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="the array's name = .* holds"):
        sbatch.render_array(range(6), tmp_path, Site(), name=name)
    with pytest.raises(ConfigError, match="its folder = .* holds"):
        sbatch.render_array(range(6), tmp_path / name, Site())


@pytest.fixture
def tasks(tmp_path):
    path = tmp_path / "tasks.jsonl"
    code = "import os, sys; print('in', *sys.argv[1:], flush=True); sys.exit(3) if sys.argv[1] == 'bad' else None; "
    code += "sys.argv[1] == 'killed' and os.kill(os.getpid(), 9)"
    names = ["good one", "bad", "killed"]
    path.write_text("".join(json.dumps([sys.executable, "-c", code, name]) + "\n" for name in names))
    return str(path)


@pytest.mark.parametrize(("number", "code", "message"), [
    (0, 0, ""), (1, 3, "task 1 of 0-2 failed with exit code 3: "), (2, 137, "task 2 of 0-2 failed with SIGKILL: "),
])  # fmt: skip
def test_one_task(tasks, capfd, number, code, message):
    assert sbatch.main([tasks, str(number)]) == code
    printed = capfd.readouterr()
    assert printed.out.startswith(f"task {number} of 0-2: {sys.executable} -c ") and "\nin " in printed.out
    assert printed.err.startswith(message) and bool(printed.err) is bool(message)


@pytest.mark.parametrize(("words", "message"), [
    (["3"], "has tasks 0 to 2"), (["x"], "usage: "), ([], "usage: "), (["0", "1"], "usage: "),
])  # fmt: skip
def test_wrong_numbers(tasks, words, message):
    with pytest.raises(ConfigError, match=message):
        sbatch.main([tasks, *words])


@pytest.mark.parametrize(("text", "message"), [
    ('["a"]\n"b"\n', "tasks.jsonl:2: expected a list of words"), ("[]\n", "tasks.jsonl:1"), ("{", "not a list of"),
    ('[["a"], 1]\n', "tasks.jsonl:1"), (None, "No such file"), ('["nonsuch-program"]', "nonsuch-program: No such file"),
])  # fmt: skip
def test_wrong_files(tmp_path, text, message):
    if text is not None:
        (tmp_path / "tasks.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        sbatch.main([str(tmp_path / "tasks.jsonl"), "0"])


if __name__ == "__main__":
    GOLDEN.write_text(rendered())

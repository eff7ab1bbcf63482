"""The sbatch file of a training job: one in full, and what changes it."""

import shutil
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import pytest

from launch.job import TrainingJob, render
from launch.site import Site, read_site
from tests.toy import REPO
from torchtitan_deltaproduct.errors import ConfigError

GOLDEN = Path(__file__).with_name("job.sbatch")
JOB = TrainingJob(
    config=Path("/runs/392M/launch/003/dp.toml"),
    overrides=["--optimizer.lr", "1e-4", "--compile.enable", "--data.paths", "['/data/a b', '/data/c']"],
    run=Path("/runs/392M"), folder=Path("/runs/392M/launch/003"), workdir=Path("/home/me/torchtitan-deltaproduct"),
    code=Path("/runs/392M/launch/003/code"),
    nodes=2, ranks_per_node=8, gpus_per_node=8, name="dp",
)  # fmt: skip


def test_golden():
    """Written anew with: python -m tests.launch.test_job"""
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


if __name__ == "__main__":
    GOLDEN.write_text(rendered())

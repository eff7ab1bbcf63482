"""The sbatch file of a training job: one in full, and what changes it."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.job import Job, render
from launch.sbatch import ROOT
from launch.site import Site, read_site
from tests.toy import REPO

GOLDEN = Path(__file__).with_name("job.sbatch")
JOB = Job(
    config=Path("/runs/392M/launch/003/dp.toml"),
    overrides=["--optimizer.lr", "1e-4", "--compile.enable", "--data.paths", "['/data/a b', '/data/c']"],
    run=Path("/runs/392M"), folder=Path("/runs/392M/launch/003"), workdir=Path("/home/me/torchtitan-deltaproduct"),
    nodes=2, ranks_per_node=8, gpus_per_node=8, name="dp",
)  # fmt: skip


def test_golden():
    """Written anew with: python -m tests.launch.test_job"""
    assert rendered() == GOLDEN.read_text()


def rendered() -> str:
    return render(JOB, read_site(REPO / "launch/site_example.toml")).replace(str(ROOT), "/repo")


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
    job = replace(JOB, time="30", dependency="afterany:12", max_requeues=2, max_restarts=0, nodes=1)
    text = render(job, Site(time="24:00:00", rdzv_host="127.0.0.1", signal_seconds=60))
    for line in ("--time=30\n", "#SBATCH --dependency=afterany:12\n", "--max 2 ", "--max-restarts=0 ", "on 1 node x 8",
                 "first=127.0.0.1\n", "#SBATCH --signal=USR1@60\n", "SHUTDOWN_TIMEOUT=54\n", "--wait=54 "):  # fmt: skip
        assert line in text, line


if __name__ == "__main__":
    GOLDEN.write_text(rendered())

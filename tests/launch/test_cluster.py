"""Jobs on a real SLURM cluster of two nodes: preempted, out of time, cancelled, refused, and an array.

    bash launch/test.sh tests/launch/test_cluster.py               about 90 s on two idle cores
    bash launch/test.sh -m slow tests/launch/test_cluster.py       three preemptions in a row, and SLURM's own warning

Submitted by `launch.slurm` itself. The trainer is the real one, with pauses at the moments to hit (dist/slow_train.py).
"""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import sbatch, slurm
from launch.sbatch import submit_array
from launch.site import read_site
from tests.launch.slurm_cluster import Cluster
from tests.toy import REPO, assert_same_weights, learned, weights
from torchtitan_deltaproduct.errors import UserError
from torchtitan_deltaproduct.events import read_events

pytestmark = pytest.mark.timeout(900)
URGENT = """#!/bin/bash
#SBATCH --partition=urgent --nodes=2 --exclusive --time=1 --output=/dev/null
sleep 1
"""


@dataclass
class Training:
    """A submitted training job."""

    cluster: Cluster
    run: Path
    job: str
    output: Path

    def until(self, text: str, seconds: float = 240, count: int = 1) -> None:
        """Waits until the job has printed `text` so many times."""
        end = time.monotonic() + seconds
        while self.printed().count(text) < count:
            assert time.monotonic() < end, f"{text!r} x {count} is not in\n{self.printed()[-4000:]}"
            time.sleep(0.1)

    def printed(self) -> str:
        return self.output.read_text()

    def stops(self) -> list[tuple]:
        events = [event for event in read_events(self.run) if event["event"] == "stop"]
        return [(event["reason"], event["detail"], event["saved"]) for event in events]

    def launches(self) -> list[tuple]:
        events = [event for event in read_events(self.run) if event["event"] == "launch"]
        return [(event["slurm_job"], event["slurm_restart"], event["ranks"]) for event in events]

    def decisions(self) -> list[str]:
        """The lines of requeues.log without their time."""
        return [line.split(" ", 1)[1] for line in (self.run / "launch/requeues.log").read_text().splitlines()]


@pytest.fixture
def submit(cluster, toy, tmp_path, monkeypatch, capsys):
    """Submits the toy run; the jobs of a test are cancelled at its end."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sbatch, "TRAIN", "tests.dist.slow_train")
    # The copy of the code that a job runs has no tests in it.
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    site = tmp_path / "site.toml"

    def submit(*words: str, pause: float = 0.4, nodes: int = 2, signal_seconds: int = 30) -> Training:
        monkeypatch.setenv("PAUSE", str(pause))
        # Both nodes have the address of this machine; their names are no addresses.
        site.write_text(f'rdzv_host = "127.0.0.1"\ncpus_per_rank = 1\nsignal_seconds = {signal_seconds}\ntime = "5"\n')
        run = tmp_path / "a run"
        given = [str(toy), "--site", str(site), "--nodes", str(nodes), "--ranks-per-node", "1"]
        slurm.main([*given, "--job.dump_folder", str(run), *words])
        output = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("tail -f ").strip("'"))
        return Training(cluster, run, output.stem, output)

    yield submit
    cluster.run("scancel", "--user", "root")
    cluster.until_empty()


@pytest.mark.slow  # SLURM lets a minute pass before it starts a job again; test_requeue.py has every decision.
def test_two_nodes_requeued_after_a_signal(submit, unbroken):
    training = submit()
    training.until("moment step 3")
    training.cluster.run("scancel", "--signal=USR1", training.job)
    training.until("no requeue: finished at step 8")
    training.cluster.wait_for(training.job, "COMPLETED", Restarts="1")
    assert training.launches() == [(training.job, None, 2), (training.job, 1, 2)]
    assert training.stops() == [("signal", "SIGUSR1", True), ("finished", "", True)]
    first, second = training.decisions()
    assert first.startswith(f"job {training.job}, requeued 0 times: requeue: signal at step ")
    assert second == f"job {training.job}, requeued 1 times: no requeue: finished at step 8"
    printed = training.printed()
    assert "on SIGUSR1)" in printed and "resumed step" in printed and "FSDP2 over 2 ranks" in printed
    assert learned(training.run) == learned(unbroken)
    assert_same_weights(weights(training.run, 8), weights(unbroken, 8))


@pytest.mark.slow
def test_cancelled_by_its_user(submit):
    """It saves and ends for good; meanwhile no second job gets into the run."""
    training = submit(nodes=1)
    training.until("moment step 2")
    with pytest.raises(UserError, match=f"job {training.job} is RUNNING"):
        submit(nodes=1)
    training.cluster.run("scancel", training.job)
    training.cluster.wait_for(training.job, "CANCELLED", Restarts="0")
    assert training.stops() == [("signal", "SIGTERM", True)]
    (decision,) = training.decisions()
    assert "no requeue: signal at step" in decision and "SLURM ends the job" in decision


@pytest.mark.slow  # Waits for a time limit; test_faults.py has one without SLURM.
def test_out_of_time(submit):
    """The ranks know the time limit and stop before it, and the job goes on after a requeue with a longer one."""
    # Stops 10 s after the job's start, or with its first step after that.
    training = submit("--time", "2", "--guard.walltime_margin_seconds", "110", nodes=1, pause=0.8)
    training.until("requeue: walltime at step")
    training.cluster.run("scontrol", "update", f"JobId={training.job}", "TimeLimit=10")
    training.until("no requeue: finished at step 8")
    assert training.stops()[0] == ("walltime", "", True) and training.stops()[-1] == ("finished", "", True)
    assert "walltime: until " in training.printed() and "(SLURM_JOB_END_TIME)" in training.printed()


@pytest.mark.slow
def test_refused_settings_are_not_requeued(submit):
    training = submit("--data.paths", "nowhere", nodes=1)
    training.cluster.wait_for(training.job, "FAILED", Restarts="0")
    (decision,) = training.decisions()
    # Such a launch never owned the run folder, and leaves no word in it: the exit code decides.
    assert "no requeue: ended with exit code 2 before training began" in decision
    assert training.printed().count("There is no folder nowhere") == 1


def test_array(cluster, tmp_path, monkeypatch):
    """Six tasks, two at a time, of which one fails and says so."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    (tmp_path / "site.toml").write_text('time = "5"\n')
    commands = [["bash", "-c", f"echo result {number}; exit {3 * (number == 4)}"] for number in range(6)]
    job, folder = submit_array(commands, tmp_path / "evals", read_site(tmp_path / "site.toml"), max_parallel=2)
    for number in range(6):
        cluster.wait_for(f"{job}_{number}", "FAILED" if number == 4 else "COMPLETED", 60)
        printed = (folder / f"{job}_{number}.out").read_text()
        assert printed.startswith(f"task {number} of 0-5: ") and f"\nresult {number}\n" in printed
        assert ("task 4 of 0-5 failed with exit code 3" in printed) is (number == 4)
    assert not (folder / f"{job}_6.out").exists()


@pytest.mark.slow
def test_preempted_three_times(submit, cluster, unbroken, tmp_path):
    """SLURM itself takes the nodes for an urgent job and requeues ours; nothing that is learned changes."""
    (tmp_path / "urgent.sbatch").write_text(URGENT)
    training = submit(pause=0.6)
    for step, restart in ((1, 0), (3, 1), (5, 2)):
        training.until(f"requeued {restart} times\n")
        training.until(f"moment step {step + 1} on rank 0")
        cluster.run("sbatch", str(tmp_path / "urgent.sbatch"))
        training.until("SLURM ends the job", count=restart + 1)
    training.until("no requeue: finished at step 8")
    cluster.wait_for(training.job, "COMPLETED", Restarts="3")
    assert training.stops() == [("signal", "SIGTERM", True)] * 3 + [("finished", "", True)]
    assert [restart for _, restart, _ in training.launches()] == [None, 1, 2, 3]
    assert learned(training.run) == learned(unbroken)
    assert_same_weights(weights(training.run, 8), weights(unbroken, 8))


@pytest.mark.slow
def test_warned_by_slurm(submit):
    """SLURM's own SIGUSR1 before the time limit, whatever the ranks are doing then."""
    training = submit("--time", "1", "--guard.walltime_margin_seconds", "0", pause=2.0)
    training.until("requeue: ")
    decision = training.decisions()[0]
    assert "SIGUSR1" in decision and ": requeue: " in decision, decision
    training.cluster.run("scontrol", "update", f"JobId={training.job}", "TimeLimit=10")
    training.until("no requeue: finished at step 8")


@pytest.mark.slow
def test_at_most_so_many_requeues(submit):
    training = submit("--max-requeues", "1", nodes=1)
    for restart, step in ((0, 2), (1, 4)):
        training.until(f"requeued {restart} times\n")
        training.until(f"moment step {step} on rank 0")
        training.cluster.run("scancel", "--signal=USR1", training.job)
    training.until("but it was requeued 1 times already, of at most 1")
    training.cluster.wait_for(training.job, "FAILED", Restarts="1")


@pytest.mark.slow
def test_interrupted_by_a_person(submit):
    training = submit(nodes=1)
    training.until("moment step 2")
    training.cluster.run("scancel", "--signal=INT", training.job)
    training.until("a person stopped it")
    training.cluster.wait_for(training.job, "FAILED", Restarts="0")
    assert training.stops() == [("signal", "SIGINT", True)]

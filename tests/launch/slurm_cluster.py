"""A real SLURM cluster on this machine for tests: munged, slurmctld and two slurmd, as nodes n1 and n2.

    from tests.launch.slurm_cluster import cluster                 # a fixture, once a session; importing it is enough

    def test(cluster):
        job = cluster.run("sbatch", "--parsable", "job.sbatch")
        cluster.wait_for(job, "COMPLETED")

Needs Debian's packages slurm-wlm and munge, and root (`bash .ci/packages.sh`); where they are missing its tests are
skipped and say so. Both nodes have this host's address, so a rendezvous endpoint must be 127.0.0.1. Partition `main`
is the default; a job in `urgent` takes the nodes of one in `main`, which SLURM then requeues.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
# Debian keeps daemons where a user's PATH does not look.
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
# A requeued job waits until its credential has expired: by default, and with less than 5 s, two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
# A requeued job is looked at when it may start, not a minute later.
SchedulerParameters=sched_interval=1,sched_min_interval=0
# The seconds that SIGTERM leaves before SIGKILL, when a job is cancelled, preempted or out of time.
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=8 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=2000
PartitionName=main Nodes=n1,n2 Default=YES State=UP PriorityTier=1 GraceTime=0
PartitionName=urgent Nodes=n1,n2 State=UP PriorityTier=2 PreemptMode=OFF
"""


class Cluster:
    """The running cluster; its commands are called with `run`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        # What a surrounding job would have set must not reach the jobs of the tests.
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_"))]:
            if name != "SLURM_CONF":
                del self.environment[name]

    def start(self) -> None:
        """Starts the daemons and waits until both nodes are idle."""
        from tests.processes import free_port  # here, because it imports torch, which the guardian can do without

        self.folder.chmod(0o755)
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        host, ports = socket.gethostname(), [free_port() for _ in range(3)]
        conf = CONF.format(host=host, controller_port=ports[0], ports=ports[1:], folder=self.folder)
        (self.folder / "slurm.conf").write_text(conf)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self.run("munged", f"--socket={self.folder}/munge.socket", *files)
        self.run("slurmctld", "-f", self.environment["SLURM_CONF"])
        for node in ("n1", "n2"):
            self.run("slurmd", "-f", self.environment["SLURM_CONF"], "-N", node)
        end = time.monotonic() + 30
        while self.run("sinfo", "--noheader", "--partition=main", "--format=%T %D", check=False) != "idle 2":
            assert time.monotonic() < end, (self.folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends every process of the cluster, and what its jobs left behind."""
        for _ in range(50):
            pids = self.processes()
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        raise RuntimeError(f"processes of the cluster in {self.folder} do not end: {self.processes()}")

    def processes(self) -> list[int]:
        """Processes other than this one that carry the cluster's configuration in their environment."""
        mark, pids = f"SLURM_CONF={self.folder}/slurm.conf".encode(), []
        for entry in Path("/proc").iterdir():
            # Processes come and go while we look.
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and int(entry.name) != os.getpid():
                    words = (entry / "environ").read_bytes().split(b"\0")
                    if mark in words and (entry / "exe").exists():
                        pids.append(int(entry.name))
        return pids

    def run(self, *command: str, check: bool = True) -> str:
        """Runs a command against the cluster.

        Returns:
            What it printed, without blanks around it.
        """
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job: {"JobState": "RUNNING", "Restarts": "0", ...}."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, state: str, seconds: float = 120, **expected: str) -> dict[str, str]:
        """Waits until a job is in `state`, and other fields of `scontrol show job` are as expected."""
        end, wanted = time.monotonic() + seconds, {"JobState": state, **expected}
        while True:
            shown = self.job(job)
            if all(shown.get(name) == value for name, value in wanted.items()):
                return shown
            assert time.monotonic() < end, f"job {job} is not {wanted} after {seconds} s: {shown}"
            time.sleep(0.1)

    def until_empty(self, seconds: float = 60) -> None:
        """Waits until no job is left in the queue."""
        end = time.monotonic() + seconds
        while left := self.run("squeue", "--noheader"):
            assert time.monotonic() < end, f"jobs are left after {seconds} s:\n{left}"
            time.sleep(0.2)


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge (as .ci/packages.sh does)"
    return "" if os.geteuid() == 0 else "SLURM's daemons need root"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of two nodes that lives as long as the test session."""
    if reason := missing():
        pytest.skip(f"no SLURM cluster: {reason}")
    # Not below pytest's folder: munged refuses a socket that others cannot reach.
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")))
    # Ends the cluster when this process closes the pipe, or is killed.
    command = [sys.executable, "-m", "tests.launch.slurm_cluster", str(cluster.folder)]
    guardian = subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE)
    try:
        cluster.start()
        yield cluster
    finally:
        guardian.stdin.close()
        assert guardian.wait(timeout=60) == 0


def guard(folder: Path) -> None:
    """Waits for the end of stdin, then ends the cluster in `folder` and removes it."""
    sys.stdin.read()
    Cluster(folder).stop()
    shutil.rmtree(folder)


if __name__ == "__main__":
    guard(Path(sys.argv[1]))

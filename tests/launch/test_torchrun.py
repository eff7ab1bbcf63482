"""launch.torchrun with small programs as ranks: what it does beyond torchrun."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.toy import REPO, kill, log_of, wait_for

RANK = """
import os, signal, sys, time
rank, seen = os.environ["RANK"], []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda got, frame: seen.append(signal.Signals(got).name))
def say(line):
    os.write(1, f"{line}\\n".encode())  # One call: two ranks never mix their words in a line.
say(f"rank {rank} starts")
if sys.argv[1] == "leave" and rank == "1":
    sys.exit(int(sys.argv[2]))
while not seen:
    time.sleep(0.01)
time.sleep(float(sys.argv[2]) if sys.argv[1] == "save" else 0)
say(" ".join(("rank", rank, "saved on", *seen)))
"""


@pytest.fixture
def start(tmp_path):
    """Starts launch.torchrun with two ranks that run RANK with the given words; ends it after the test."""
    (tmp_path / "rank.py").write_text(RANK)
    processes = []

    def start(*words: str, **environment: str) -> subprocess.Popen:
        torchrun = ["-m", "launch.torchrun", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
        with open(tmp_path / "run.log", "w") as log:
            processes.append(subprocess.Popen(
                [sys.executable, *torchrun, str(tmp_path / "rank.py"), *words], cwd=REPO, stdout=log, stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, start_new_session=True,
            ))  # fmt: skip
        return processes[-1]

    yield start
    for process in processes:
        kill(process)


def test_ranks_save_whatever_comes(start, tmp_path):
    """Three signals: torchrun itself leaves at the third, and its ranks without a parent."""
    run = tmp_path / "run"
    process = start("save", "2")
    for rank in (0, 1):
        wait_for(run, f"rank {rank} starts")
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.3)
    assert process.wait(timeout=60) == 128 + signal.SIGUSR1
    printed = log_of(run)
    assert "rank 0 saved on SIGUSR1\n" in printed and "rank 1 saved on SIGUSR1\n" in printed
    assert printed.count("torchrun: SIGTERM: the ranks are stopping already, they have up to 300 s to save") == 2
    assert "torchrun: stopped by SIGUSR1" in printed and "Traceback" not in printed


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_while_it_starts(start, tmp_path, number):
    """Importing torch takes seconds, and so do the first ranks; it ends by the signal, and by nothing else."""
    for wait in (0.1, 0.6, 1.2, 2.5):
        process = start("save", "0")
        time.sleep(wait)
        process.send_signal(number)
        # In the first moments Python itself has no handler yet. Ranks that are starting are killed.
        assert process.wait(timeout=60) in (-number, 128 + number), (wait, log_of(tmp_path / "run"))
        assert "Traceback" not in log_of(tmp_path / "run"), (wait, log_of(tmp_path / "run"))


def test_time_to_save_has_an_end(start, tmp_path):
    run = tmp_path / "run"
    process = start("save", "60", SHUTDOWN_TIMEOUT="1")
    for rank in (0, 1):
        wait_for(run, f"rank {rank} starts")
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 20 and "saved" not in log_of(run)


@pytest.mark.parametrize(("code", "starts", "message"), [
    (2, 1, ""), (7, 2, "torchrun: rank 1 was the first to fail (exit code 7)"),
])  # fmt: skip
def test_refusals_are_not_repeated_and_failures_are(start, tmp_path, code, starts, message):
    process = start("leave", str(code))
    assert process.wait(timeout=120) == (2 if code == 2 else 1)
    printed = log_of(tmp_path / "run")
    assert printed.count("rank 1 starts") == starts and message in printed and "Traceback" not in printed
    assert ("elastic" in printed) == (code != 2)


def test_a_wrong_timeout(start, tmp_path):
    assert start("save", "0", SHUTDOWN_TIMEOUT="soon").wait(timeout=60) == 2
    assert log_of(tmp_path / "run") == "error: SHUTDOWN_TIMEOUT=soon: expected seconds, a whole number\n"


LISTENERS = """
import os, pathlib, torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
table = {}
for name in ("/proc/net/tcp", "/proc/net/tcp6"):
    for line in pathlib.Path(name).read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A":
            table[f"socket:[{words[9]}]"] = words[1]
for pid in ("self", os.getppid()):
    for handle in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            address = table.get(os.readlink(handle))
        except FileNotFoundError:
            continue
        if address:
            # In one write, or two ranks could share a line.
            os.write(1, f"listens on {address.split(':')[0]}; ".encode())
dist.barrier()
"""


def test_one_node_listens_on_the_loopback_alone(tmp_path):
    (tmp_path / "rank.py").write_text(LISTENERS)
    words = ["-m", "launch.torchrun", "--standalone", "--nproc_per_node", "2", str(tmp_path / "rank.py")]
    options = {"cwd": REPO, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "timeout": 120}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    # The two stores of torchrun, and gloo's of each rank; 0100007F is 127.0.0.1.
    assert done.stdout.count("listens on 0100007F") >= 4
    assert done.stdout.count("listens on") == done.stdout.count("listens on 0100007F"), done.stdout

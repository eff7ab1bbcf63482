"""local.sh and multinode.sh: clean shell, errors before anything starts, and real runs on one and on two nodes."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from launch import ssh
from launch.node import Layout, layout_of, threads
from tests.processes import free_port
from tests.toy import REPO, assert_same_weights, kill, learned, log_of, records, wait_for, weights
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.events import last_stop, read_events

SCRIPTS = [*sorted(REPO.glob("launch/*.sh")), *sorted(REPO.glob(".ci/*"))]
# `python` of the scripts is the one that runs the tests.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
# ssh as the scripts call it, but every host is this one; "down" cannot be reached.
SSH = """#!/bin/bash
while [ "${1:0:1}" = - ]; do shift 2; done
[ "$1" != down ] || { echo "ssh: connect to host down: no route to host" >&2; exit 255; }
shift
exec sh -c "$*"
"""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    done = subprocess.run(["shellcheck", "-x", str(script)], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def start(script, run, *words: str, **environment: str) -> subprocess.Popen:
    """Starts a script from another folder, its output in run.log."""
    with open(f"{run}.log", "a") as log:
        return subprocess.Popen(["bash", str(REPO / "launch" / script), *words], cwd=run.parent, stdout=log, stderr=log,
                                env=ENVIRONMENT | environment, start_new_session=True)  # fmt: skip


@pytest.mark.parametrize(("script", "words", "environment", "message"), [
    ("local.sh", [], {}, "the first argument must be a TOML file"),
    ("local.sh", ["--training.steps", "3"], {}, "the first argument must be a TOML file"),
    ("local.sh", ["toy.toml"], {"NPROC": "two"}, "NPROC=two: expected a whole number of at least 1"),
    ("local.sh", ["nowhere.toml"], {"NPROC": "1"}, "nowhere.toml: no such file"),
    ("multinode.sh", ["toy.toml"], {}, "set NNODES and RDZV_ENDPOINT=host:port"),
    ("multinode.sh", ["toy.toml"], {"NNODES": "2", "RDZV_ENDPOINT": "n1"}, "RDZV_ENDPOINT=n1: expected host:port"),
    ("multinode.sh", ["toy.toml"], {"HOSTS": "n1 n1"}, 'HOSTS="n1 n1": expected names of different hosts'),
    ("multinode.sh", [], {"HOSTS": "n1"}, "what to train is missing"),
])  # fmt: skip
def test_wrong_use_is_one_message(tmp_path, script, words, environment, message):
    process = start(script, tmp_path / "run", *words, **environment)
    assert process.wait(timeout=60) == 2
    printed = log_of(tmp_path / "run")
    assert message in printed and printed.startswith("error: ") and len(printed.splitlines()) <= 3


@pytest.mark.parametrize(("variables", "message"), [
    ({"NNODES": "2"}, "NNODES=2 needs RDZV_ENDPOINT"),
    ({"NNODES": "0"}, "NNODES=0: expected a whole number of at least 1"),
    ({"NNODES": "2", "RDZV_ENDPOINT": "n1:1", "NODE_RANK": "2"}, "NODE_RANK=2: counts from 0, and NNODES=2"),
    ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1"),
    ({"NNODES": "2", "RDZV_ENDPOINT": "n1:1"}, "RDZV_ID=: RDZV_ENDPOINT needs a random word"),
])  # fmt: skip
def test_wrong_variables(variables, message):
    with pytest.raises(ConfigError, match=message):
        layout_of({"NPROC": "1"} | variables)


def test_layout():
    assert layout_of({"NPROC": "2", "MAX_RESTARTS": "0"}) == Layout(1, 2, 0)
    assert Layout(1, 2).torchrun_arguments() == ["--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    two = {"NPROC": "8", "NNODES": "2", "RDZV_ENDPOINT": "[fe80::1]:29400", "RDZV_ID": "a"}
    assert layout_of(two | {"NODE_RANK": "1"}).torchrun_arguments()[-3:] == [
        "--rdzv-endpoint=[fe80::1]:29400", "--rdzv-id=a", "--rdzv-conf=is_host=false"
    ]  # fmt: skip
    assert "--nnodes=2" in layout_of(two).torchrun_arguments() and layout_of(two).is_host is None
    assert 1 <= threads(10_000) == 1 and threads(1) <= 8


@pytest.mark.slow
def test_local_stops_and_goes_on(toy, tmp_path, unbroken):
    """Two ranks; SIGUSR1 to the script itself, which is torchrun by then; the same command again."""
    run = tmp_path / "run"
    words = [str(toy), "--job.dump_folder", str(run)]
    process = start("local.sh", run, *words, "--checkpoint.interval", "100", NPROC="2")
    wait_for(run, "step 2/8", 240)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=120) == 128 + signal.SIGUSR1, log_of(run)[-3000:]
    assert last_stop(read_events(run))["detail"] == "SIGUSR1"
    assert start("local.sh", run, *words, NPROC="2").wait(timeout=240) == 0, log_of(run)[-3000:]
    assert learned(run) == learned(unbroken)
    assert_same_weights(weights(run, 8), weights(unbroken, 8))


@pytest.fixture
def hosts(tmp_path):
    """The environment in which every host name is this machine."""
    program = tmp_path / "bin/ssh"
    program.parent.mkdir()
    program.write_text(SSH)
    program.chmod(0o755)
    path = f"{program.parent}:{ENVIRONMENT['PATH']}"
    return {"PATH": path, "NPROC": "1", "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}"}


@pytest.mark.slow
def test_two_nodes_over_ssh(toy, tmp_path, hosts, unbroken):
    """A real rendezvous of two nodes, with values that a shell would take apart."""
    run = tmp_path / "a run"
    odd = 'it\'s "$HOME"'
    words = [str(toy), "--job.dump_folder", str(run), "--model.flavor", odd]
    process = start("multinode.sh", run, *words, HOSTS="n1 n2", **hosts)
    assert process.wait(timeout=300) == 0, log_of(run)[-3000:]
    printed = log_of(run).splitlines()
    assert any(line.startswith("n1: ") and "finished: step 8 of 8" in line for line in printed)
    assert all(line.startswith(("n1: ", "n2: ")) for line in printed)
    assert records(run)[-1]["step"] == 8 and odd in (run / "config.json").read_text().replace('\\"', '"')
    assert learned(run) == learned(unbroken)


def test_ctrl_c_reaches_all_hosts(tmp_path, hosts):
    """The ranks' part is tested above; here each host runs a program that notes its signal."""
    run, process = tmp_path / "run", None
    note = "trap 'echo got INT; exit 130' INT; echo ready; while :; do sleep 0.1; done"
    command = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
from launch import ssh
ssh.remote_command = lambda words: "exec bash -c " + ssh.shlex.quote("echo launch-pid $$; " + {note!r})
sys.exit(ssh.main(["x.toml"]))"""
    with open(f"{run}.log", "w") as log:
        process = subprocess.Popen([sys.executable, "-c", command], stdout=log, stderr=log, start_new_session=True,
                                   env=ENVIRONMENT | hosts | {"HOSTS": "n1 n2"})  # fmt: skip
    try:
        for host in ("n1", "n2"):
            wait_for(run, f"{host}: ready", 60)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 130
    finally:
        kill(process)
    printed = log_of(run)
    assert "n1: got INT" in printed and "n2: got INT" in printed and "SIGINT goes to n1, n2" in printed


def test_a_host_that_cannot_be_reached_ends_the_others(toy, tmp_path, hosts):
    run = tmp_path / "run"
    process = start("multinode.sh", run, str(toy), "--job.dump_folder", str(run), HOSTS="n1,down", **hosts)
    assert process.wait(timeout=60) == 255, log_of(run)
    assert "down cannot be reached" in log_of(run) and "SIGTERM goes to n1" in log_of(run)


def test_forwarded_variables():
    """Through standard input: what stands on a command line can be read by everybody on both machines."""
    environment = {"PATH": "/p", "SECRET": "s", "NCCL_DEBUG": "INFO", "MINE": "it's", "ENV": "MINE", "HOSTS": "a b",
                   "HF_TOKEN": "hf_x\ny", "WANDB_API_KEY": "w"}  # fmt: skip
    exports = ssh.remote_exports(["me@a", "b"], 1, environment | {"RDZV_ID": "7"})
    shell = ["bash", "-c", 'export HOSTS=1; eval "$(cat)"; exec /usr/bin/env -0']
    done = subprocess.run(shell, input=exports, capture_output=True, text=True)
    exported = dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line)
    expected = {"PATH": "/p", "NCCL_DEBUG": "INFO", "MINE": "it's", "HF_TOKEN": "hf_x\ny", "WANDB_API_KEY": "w",
                "NNODES": "2", "NODE_RANK": "1", "RDZV_ENDPOINT": "a:29400", "RDZV_ID": "7"}  # fmt: skip
    assert expected.items() <= exported.items() and not {"SECRET", "ENV", "HOSTS"} & exported.keys()
    command = ssh.remote_command(["x.toml"])
    assert "/p" not in command.replace(str(REPO), "") and "7" not in command.replace(str(REPO), "")


def test_no_secret_is_on_a_command_line(tmp_path, hosts):
    """Of any process that was started: the stand-in for ssh and the host's shell note theirs."""
    seen = tmp_path / "bin/seen"
    program = tmp_path / "bin/ssh"
    program.write_text(program.read_text().replace("while [", f'echo "$@" >>{seen}\nwhile [', 1))
    (tmp_path / "multinode.sh").write_text('echo "token $HF_TOKEN key $WANDB_API_KEY id ${#RDZV_ID}"\n')
    launcher = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
from launch import ssh
ssh.__file__ = {str(tmp_path / "ssh.py")!r}
sys.exit(ssh.main(["x.toml"]))"""
    environment = ENVIRONMENT | hosts | {"HOSTS": "n1", "HF_TOKEN": "hf_4711", "WANDB_API_KEY": "wandb_4711"}
    done = subprocess.run([sys.executable, "-c", launcher], env=environment, capture_output=True, text=True, timeout=60)
    assert "n1: token hf_4711 key wandb_4711 id 32" in done.stdout, done.stderr
    assert "_4711" not in seen.read_text() and done.stdout.count("_4711") == 2


def test_all_hosts_meet_under_one_random_name(monkeypatch):
    sent = []
    monkeypatch.setenv("HOSTS", "a b c")
    monkeypatch.delenv("RDZV_ID", raising=False)
    monkeypatch.setattr(ssh, "Host", lambda name, command, exports: sent.append(exports))
    monkeypatch.setattr(ssh, "wait", lambda *given: 0)
    monkeypatch.setattr(ssh.signal, "signal", lambda *given: None)
    for _ in range(2):
        assert ssh.main(["x.toml"]) == 0
    names = [re.search(r"RDZV_ID=(\w{32})\n", exports)[1] for exports in sent]
    assert len(names) == 6 and len(set(names[:3])) == len(set(names[3:])) == 1 and names[0] != names[3]

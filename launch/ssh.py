"""Starts multinode.sh on every host of HOSTS over ssh and stands here for them all; multinode.sh calls it.

    HOSTS="n1 n2" bash launch/multinode.sh train_configs/X.toml [--section.key value ...]

The hosts share this folder and have ssh keys; PATH and the variables of FORWARDED go along, so that the environment
that is active here is active there; through ssh's standard input, since everybody can read a command line. Every line
of output begins with its host. Ctrl-C, SIGTERM and SIGUSR1 reach torchrun on every host, and the ranks save. If a host
fails, the others have SHUTDOWN_TIMEOUT seconds to end of themselves, then they get SIGTERM.
"""

import contextlib
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from torchtitan_deltaproduct.errors import ConfigError, exit_on_user_error

from .torchrun import SIGNALS, seconds_to_save

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=30")
NOT_REACHED = 255
"""ssh's own exit code: no connection, as opposed to a command that failed."""
FORWARDED = (
    *("PATH", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "OMP_NUM_THREADS"),
    *("NPROC", "MAX_RESTARTS", "SHUTDOWN_TIMEOUT", "NCCL_*", "GLOO_*", "CUDA_*", "TORCH_*", "HF_*", "WANDB_*"),
)
"""Variables, or patterns of their names, that go to every host; ENV adds to them."""
PID = "launch-pid"


class Host:
    """One node: an ssh client, and the process at its other end."""

    def __init__(self, name: str, command: str, exports: str):
        self.name, self.pid, self.missed = name, 0, None
        self.lock = threading.Lock()
        # A session of its own, or the terminal's Ctrl-C would end the connection before the ranks have saved.
        self.client = subprocess.Popen(
            [*SSH, name, command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding="utf-8", errors="surrogateescape", start_new_session=True,
        )  # fmt: skip
        # A client that ended at once says itself why.
        with contextlib.suppress(BrokenPipeError):
            self.client.stdin.write(exports)
        with contextlib.suppress(BrokenPipeError):
            self.client.stdin.close()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Prints what comes from the host, its name in front; the first line is the process id."""
        for line in self.client.stdout:
            if not self.pid and line.startswith(PID):
                with self.lock:
                    self.pid = int(line.split()[1])
                if self.missed is not None:
                    self.send(self.missed)
            else:
                print(f"{self.name}: {line}", end="", flush=True)

    def send(self, number: signal.Signals) -> None:
        """Signals the process on the host; as soon as its id is known."""
        with self.lock:
            if not self.pid:
                self.missed = number
                return
        kill = f"kill -s {number.name.removeprefix('SIG')} {self.pid}"
        subprocess.Popen([*SSH, self.name, kill], stdin=subprocess.DEVNULL, start_new_session=True)


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    names, grace = os.environ["HOSTS"].replace(",", " ").split(), seconds_to_save()
    if len(set(names)) < len(names) or any(name.startswith("-") for name in names):
        raise ConfigError(f'HOSTS="{" ".join(names)}": expected names of different hosts')
    if not words:
        raise ConfigError('what to train is missing: HOSTS="n1 n2" bash launch/multinode.sh CONFIG.toml')
    received: list[signal.Signals] = []
    for number in SIGNALS:
        signal.signal(number, lambda got, frame: received.append(signal.Signals(got)))
    # One name for all hosts.
    environment = {**os.environ, "RDZV_ID": os.environ.get("RDZV_ID") or secrets.token_hex(16)}
    hosts = [
        Host(name, remote_command(words), remote_exports(names, rank, environment)) for rank, name in enumerate(names)
    ]
    return wait(hosts, grace, received)


def remote_command(words: list[str]) -> str:
    """What a host's shell is to run: first it tells its process id, which stays that of torchrun.

    The variables come through standard input, as `remote_exports` makes them.
    """
    script = Path(__file__).with_name("multinode.sh").resolve()
    command = shlex.join(["bash", str(script), *words])
    line = f'cd {shlex.quote(os.getcwd())} && echo {PID} $$ && eval "$(cat)" && exec {command} </dev/null'
    # The login shell may be any; bash reads the rest.
    return f"exec bash -c {shlex.quote(line)}"


def remote_exports(names: list[str], rank: int, environment: Mapping[str, str]) -> str:
    """Shell lines with the variables of host `rank`."""
    endpoint = environment.get("RDZV_ENDPOINT") or f"{names[0].rpartition('@')[2]}:29400"
    wanted = (*FORWARDED, *environment.get("ENV", "").replace(",", " ").split())
    variables = {name: value for name, value in environment.items()
                 if name.isidentifier() and any(fnmatchcase(name, pattern) for pattern in wanted)}  # fmt: skip
    variables |= {"NNODES": str(len(names)), "NODE_RANK": str(rank), "RDZV_ENDPOINT": endpoint}
    variables["RDZV_ID"] = environment["RDZV_ID"]
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join(["unset HOSTS", *lines, ""])


def wait(hosts: list[Host], grace: float, received: list[signal.Signals]) -> int:
    """Waits for all hosts, handing on the signals that are `received`.

    Returns:
        The exit code of the host that failed first, or 0.
    """
    running, code, deadline = list(hosts), 0, float("inf")
    while running:
        while received:
            number = received.pop(0)
            print(f"{number.name} goes to {', '.join(host.name for host in running)}", file=sys.stderr, flush=True)
            for host in running:
                host.send(number)
        for host in [host for host in running if host.client.poll() is not None]:
            running.remove(host)
            host.reader.join(timeout=10)
            failed = host.client.returncode
            if failed and not code:
                code = failed
                ending = "cannot be reached" if failed == NOT_REACHED else f"ended with code {failed}"
                print(f"{host.name} {ending}", file=sys.stderr, flush=True)
                deadline = time.monotonic() + (0 if failed == NOT_REACHED else grace)
        if time.monotonic() >= deadline:
            deadline = float("inf")
            received.append(signal.SIGTERM)
        time.sleep(0.1)
    return code


if __name__ == "__main__":
    exit_on_user_error(main)

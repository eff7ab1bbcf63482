"""Processes that start with everything imported, on one rank or several.

    process = start(["-m", "torchtitan_deltaproduct.train", ...], log, ranks=2)     # like subprocess.Popen, logged
    code, printed = completed(["-m", "torchtitan_deltaproduct.status", run])        # like subprocess.run
    run_distributed(check, world_size=2, args=(16,))        # check(rank, 16) on two gloo ranks; failures raise here

Importing torch and torchtitan takes seconds, and a suite needs it hundreds of times. So one process a session imports
them, has no thread yet, and forks: a copy runs as `python -m ...` would. Of several ranks a leader has the part
of torchrun: it makes the store, sets RANK and its siblings, ends all when one fails, and passes signals on. Where the
words start torchrun itself, it is the real one, and its ranks are forked too.
"""

import atexit
import ctypes
import gc
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import torch

REPO = Path(__file__).resolve().parents[1]
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_TORCHRUN = ("launch.torchrun", "torch.distributed.run")
_SET_CHILD_SUBREAPER = 36


class Process:
    """What `subprocess.Popen` tells of a process, of one that was forked elsewhere."""

    def __init__(self, pid: int, exit_code: Callable[[int], int | None]):
        self.pid, self.returncode, self._exit_code = pid, None, exit_code

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._exit_code(self.pid)
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def start(
    words: list[str], log: Path | str, ranks: int = 0, cwd: Path = REPO, env: dict | None = None
) -> Process | subprocess.Popen:
    """Starts `python WORDS` ("-m", a module, its arguments) in a session of its own, its output appended to `log`.

    With `ranks` it runs on each of so many, as under torchrun. A torch built for CUDA is not forked: its libraries have
    threads, with a GPU and without.
    """
    assert words[0] == "-m"
    if torch.version.cuda:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        with open(log, "a", encoding="utf-8") as output:
            return subprocess.Popen(
                [sys.executable, *torchrun, *words], stdout=output, stderr=subprocess.STDOUT, cwd=cwd,
                env=env or os.environ, start_new_session=True,
            )  # fmt: skip
    return _fork((_run_module, [str(cwd), *words[1:]]), log, ranks, env)


def completed(words: list[str], cwd: Path = REPO) -> tuple[int, str]:
    """Runs `python WORDS` as `start` does, to its end: the exit code, and all that it printed."""
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        return start(words, log.name, cwd=cwd).wait(), log.read()


def popen(command: Sequence[str], *, stdout, env: dict | None = None, **_) -> Process | subprocess.Popen:
    """Stands for `subprocess.Popen` where the program under test starts `python -m ...` with its output in a file."""
    forks = (*command[:2],) == (sys.executable, "-m") and (
        command[2] in _TORCHRUN or not command[2].startswith(("launch", "torch."))
    )
    if not forks:
        return subprocess.Popen(command, stdout=stdout, env=env, **_)
    return start([*command[1:]], stdout.name, cwd=Path.cwd(), env=env)


def run_distributed(function: Callable, world_size: int = 2, args: tuple = ()) -> None:
    """Calls `function(rank, *args)`, a function of a module, on each rank with the gloo process group up.

    Raises:
        AssertionError: a rank failed; the message ends with what was printed.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        process = _fork((_call_on_rank, (pickle.dumps((function, args)), sys.path)), log.name, world_size)
        code = process.wait()
        said = log.read()
    assert code == 0, f"{function.__name__} on {world_size} ranks: exit code {code}\n{said[-6000:]}"
    print(said)


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# The test's side.

_server: Connection | None = None


def _ask(*request):
    global _server
    if _server is None:
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(
            [sys.executable, "-c", "from tests.processes import serve; serve()", str(theirs.fileno())],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=REPO, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        theirs.close()
        _server = Connection(ours.detach())
        atexit.register(lambda: (_server.close(), process.wait()))
    _server.send(request)
    return _server.recv()


def _fork(program: tuple, log: Path | str, ranks: int, env: dict | None = None) -> Process:
    pid = _ask("fork", program, os.path.abspath(log), ranks, {**(env or os.environ), "OMP_NUM_THREADS": "1"})
    return Process(pid, lambda pid: _ask("poll", pid))


# The side of the process that forks.


def serve() -> None:
    """Forks what is asked for until the other side is closed; in a copy, runs the program."""
    _import_everything()
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
    # A collection would touch, and so copy, all of it in each process.
    gc.collect()
    gc.freeze()
    connection = Connection(int(sys.argv[1]))
    while True:
        try:
            what, *details = connection.recv()
        except EOFError:
            os._exit(0)
        if what == "poll":
            connection.send(_exit_code(details[0]))
        elif pid := os.fork():
            connection.send(pid)
        else:
            connection.close()
            break
    _end(partial(_become, *details))


def _end(program: Callable[[], None]) -> NoReturn:
    """Runs a program, and ends this process as Python would, but that it takes nothing apart: what was imported
    before is much, and there are hundreds of processes."""
    code: object = 0
    try:
        program()
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        traceback.print_exc()
        code = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _import_everything() -> None:
    """What a run imports, and, as that may take more seconds than all else it does here, what it compiles with."""
    from torchtitan_deltaproduct.config.stand_ins import stand_ins
    from torchtitan_deltaproduct.titan import device, run  # noqa: F401

    with stand_ins():
        device.install("cpu")
        from torchtitan_deltaproduct.titan import trainer  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch._inductor.compile_fx  # noqa: F401
    from torch._inductor import codecache, cpu_vec_isa, select_algorithm  # noqa: F401

    codecache.CacheBase.get_system()
    codecache.torch_key()
    cpu_vec_isa.pick_vec_isa()


def _exit_code(child: int) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def _become(program: tuple[Callable, tuple | list], log: str, ranks: int, environment: dict[str, str]) -> None:
    """Runs the program in a session of its own, as the leader of `ranks` copies if there are any."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    # A suite that runs in the background has it ignored, and hands that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if ranks:
        _lead(ranks)
    function, arguments = program
    function(*arguments)


def _lead(ranks: int) -> None:
    """Returns in each rank; the leader does not return."""
    pids, pipes = [], []
    for rank in range(ranks):
        receive, send = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(send)
            port = os.read(receive, 10).decode()
            os.close(receive)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0",
                           "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                           "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
            return
        os.close(receive)
        pids.append(pid)
        pipes.append(send)

    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for pipe in pipes:
        os.write(pipe, str(store.port).encode())
        os.close(pipe)

    def end_all(number: int, *_) -> None:
        for pid in pids:
            os.kill(pid, number)

    for number in _SIGNALS:
        signal.signal(number, end_all)
    failed, deadline = False, float("inf")
    while pids:
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                pids.remove(pid)
                if status and not failed:
                    failed, deadline = True, time.monotonic() + 30
                    end_all(signal.SIGTERM)
        if time.monotonic() > deadline:
            end_all(signal.SIGKILL)
        time.sleep(0.01)
    os._exit(failed)


def _run_module(cwd: str, name: str, *arguments: str) -> None:
    os.chdir(cwd)
    sys.argv, sys.path[0] = [name, *arguments], cwd
    if name in _TORCHRUN:
        _fork_ranks()
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _fork_ranks() -> None:
    """Has the ranks of torchrun, which this process will be, forked by another that has no thread."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        os.setsid()
        _serve_torchrun(Connection(theirs.detach()))
        sys.exit()
    theirs.close()
    requests = Connection(ours.detach())
    # The ranks are this process's children from when their parent ends.
    assert ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0

    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    def popen(args: tuple, env: dict[str, str], **_) -> Process:
        assert args[1:3] == ("-u", "-m"), args
        requests.send(((_run_module, [os.getcwd(), *args[3:]]), os.readlink("/proc/self/fd/1"), 0, env))
        return Process(requests.recv(), _exit_code)

    subprocess_handler.Popen = popen


def _serve_torchrun(connection: Connection) -> None:
    """Forks ranks until torchrun has ended; in a rank, runs its program."""
    while True:
        try:
            details = connection.recv()
        except EOFError:
            return
        if between := os.fork():
            os.waitpid(between, 0)
            continue
        between = os.getpid()
        if os.fork():
            os._exit(0)
        while os.getppid() == between:
            time.sleep(0.001)
        connection.send(os.getpid())
        connection.close()
        break
    _become(*details)


def _call_on_rank(pickled: bytes, path: list[str]) -> None:
    import torch.distributed as dist

    sys.path[:] = path
    function, args = pickle.loads(pickled)
    dist.init_process_group("gloo")
    try:
        function(int(os.environ["RANK"]), *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # Some of torch's C++ threads may still run, and the interpreter's teardown then aborts now and again ("terminate
    # called without an active exception"). All that the test wanted is done.
    sys.stdout.flush()
    os._exit(0)

"""Runs a test function on several gloo ranks of this machine.

    def check(rank: int, width: int) -> None:           # a module-level function: ranks are spawned
        ...torch.distributed is ready here...

    run_distributed(check, world_size=2, args=(16,))    # an exception of any rank is raised here

Each rank is a process with one thread; it has the environment torchrun would give it.
"""

import os
import socket
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(func: Callable, world_size: int = 2, args: tuple = ()) -> None:
    """Calls `func(rank, *args)` on each rank with the gloo process group up.

    Raises:
        ProcessRaisedException: `func` raised on a rank; the message holds its traceback.
    """
    mp.spawn(_rank_main, args=(world_size, free_port(), func, args), nprocs=world_size)


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank_main(rank: int, world_size: int, port: int, func: Callable, args: tuple) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        func(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # Some of torch's C++ threads may still run, and the interpreter's teardown then aborts now and again ("terminate
    # called without an active exception"). All that the test wanted is done.
    sys.stdout.flush()
    os._exit(0)

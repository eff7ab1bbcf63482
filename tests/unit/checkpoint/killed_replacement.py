"""Replaces the folder OUT, as an export does, and is killed at the MOMENT-th renaming; on NFS two folders cannot change
places in one step: `python -m tests.unit.checkpoint.killed_replacement OUT MOMENT local|nfs`."""

import os
import signal
import sys
from itertools import count
from pathlib import Path

from torchtitan_deltaproduct.checkpoint import hf

out, moment, system = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
calls = count(1)


def counted(function):
    def call(*given):
        if next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given)

    return call


def refuse(*_):
    raise OSError(22, "Invalid argument")


os.rename, os.replace = counted(os.rename), counted(os.replace)
hf.exchange = counted(hf.exchange) if system == "local" else refuse
unfinished = hf.make_unfinished(out)
(unfinished / "new").touch()
hf.put_in_place(unfinished, out)

"""A process that is asked to end when the one that started it is gone, by SIGKILL, too (Linux; elsewhere it goes on).

parent = os.getpid()
subprocess.Popen(command, preexec_fn=lambda: end_with(parent))
"""

import ctypes
import os
import signal

# Loaded before a process forks: a child must not wait for a lock that another thread of its parent held.
_LIBC = ctypes.CDLL(None)
_SET_PARENT_DEATH_SIGNAL = 1


def end_with(parent: int) -> None:
    """Called in a child: it gets SIGTERM when the process `parent`, its own, ends; at once if that has ended."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

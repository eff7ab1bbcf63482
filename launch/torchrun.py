"""torchrun as a long run needs it, with torchrun's own arguments; the launchers here start this.

    python -m launch.torchrun --standalone --nproc_per_node 8 -m torchtitan_deltaproduct.train --job.config_file X.toml

SIGTERM, SIGINT and SIGUSR1 are handed on to the ranks. Beyond torchrun (of torch 2.11 to 2.13):

- After a signal the ranks have SHUTDOWN_TIMEOUT seconds (default 300) to save. Before torch 2.12 it was always 30.
- Further signals in that time are told and passed over. torchrun leaves at the third, and its ranks without a parent.
- Ranks that refuse to go on (exit code 2: wrong settings, weights that are not finite) are not started again, and
  nothing is added to what they said.
- With --standalone its store listens on the loopback alone: whoever reaches it can run code in the ranks.
- The exit code is 128 + signal after a signal, 2 after a refusal, 1 after a failure; one line says which, no traceback.
"""

import logging
import os
import signal
import socket
import sys
import time
from types import FrameType

from torchtitan_deltaproduct.errors import ConfigError, exit_on_user_error
from torchtitan_deltaproduct.events import LAUNCHED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REFUSED = 2
"""Exit code of a rank that another start would not help, see `errors.exit_on_user_error`."""


class Shutdown:
    """The first signal, and the time the ranks have from then on."""

    def __init__(self, seconds: int):
        self.seconds = seconds
        self.signal: signal.Signals | None = None
        self.torchrun_runs = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ends torchrun's loop at the first signal; it then hands the signal on and waits."""
        name = signal.Signals(number).name
        if self.signal is not None:
            say(f"{name}: the ranks are stopping already, they have up to {self.seconds} s to save")
            return
        self.signal = signal.Signals(number)
        if not self.torchrun_runs:
            # Amid the import of torch, where an exception goes astray; no rank is there yet, nothing is to be saved.
            say(f"stopped by {name} before the ranks were started")
            os._exit(128 + number)
        from torch.distributed.elastic.multiprocessing.api import SignalException

        raise SignalException(f"got {name}", sigval=self.signal)


def main() -> int:
    shutdown = Shutdown(seconds_to_save())
    for number in SIGNALS:
        signal.signal(number, shutdown.on_signal)

    # After the handlers: importing torch takes seconds, in which a signal may come.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    repair(shutdown)
    os.environ[LAUNCHED] = str(time.time())
    words = sys.argv[1:]
    if "--standalone" in words:
        stay_on_this_machine()
        words = ["--local-addr=127.0.0.1", *words]
    try:
        shutdown.torchrun_runs = True
        run.main(["--signals-to-handle", ",".join(number.name for number in SIGNALS), *words])
    except SignalException:
        say(f"stopped by {shutdown.signal.name}")
        return 128 + shutdown.signal
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == REFUSED:
            return REFUSED
        how = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        say(f"rank {rank} was the first to fail ({how}); what it said is above")
        return 1
    return 0


def repair(shutdown: Shutdown) -> None:
    """Puts the behaviour told in the module docstring into torch's elastic agent."""
    from torch.distributed.elastic.agent.server.api import WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import api

    close, monitor = api.PContext.close, LocalElasticAgent._monitor_workers

    def refused(failures):
        return any(failure.exitcode == REFUSED for failure in failures.values())

    def close_in_time(context, death_sig=None, timeout=30):
        if refused(getattr(context, "_failures", {})):
            logging.disable()
        return close(context, death_sig, shutdown.seconds if shutdown.signal else timeout)

    def monitor_refusals(agent, group):
        result = monitor(agent, group)
        if result.state == WorkerState.FAILED and refused(result.failures):
            agent._remaining_restarts = 0
        return result

    api._terminate_process_handler = shutdown.on_signal
    api.PContext.close = close_in_time
    LocalElasticAgent._monitor_workers = monitor_refusals


def stay_on_this_machine() -> None:
    """Has the servers of torchrun's store, and gloo, listen on the loopback instead of every interface."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, dynamic_rendezvous

    def store_on_loopback(host, port, is_master=False, **given):
        if not is_master:
            return TCPStore(host, port, is_master=False, **given)
        listener = socket.create_server(("127.0.0.1", port))
        port = listener.getsockname()[1]
        return TCPStore("127.0.0.1", port, is_master=True, master_listen_fd=listener.detach(), **given)

    def store_for_ranks(handler, address, port):
        return store_on_loopback(address, port, is_master=True, multi_tenant=True)

    c10d_rendezvous_backend.TCPStore = store_on_loopback
    dynamic_rendezvous.DynamicRendezvousHandler._create_tcp_store_server = store_for_ranks
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def seconds_to_save() -> int:
    text = os.environ.get("SHUTDOWN_TIMEOUT") or "300"
    if not text.isdigit():
        raise ConfigError(f"SHUTDOWN_TIMEOUT={text}: expected seconds, a whole number")
    return int(text)


def say(text: str) -> None:
    print(f"torchrun: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)

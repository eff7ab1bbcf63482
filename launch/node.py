"""Checks a TOML for the ranks it will have, then becomes torchrun on this node; local.sh and multinode.sh call it.

    python -m launch.node train_configs/X.toml [--section.key value ...]

Environment: NPROC, MAX_RESTARTS, SHUTDOWN_TIMEOUT, OMP_NUM_THREADS; on several nodes also NNODES, RDZV_ENDPOINT,
RDZV_ID and NODE_RANK. A wrong TOML or missing data ends it with code 2, before any rank is started.
"""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from torchtitan_deltaproduct.devices import threads
from torchtitan_deltaproduct.errors import ConfigError, exit_on_user_error

USAGE = "usage: bash launch/local.sh CONFIG.toml [--section.key value ...]; --help lists the keys"
TRAIN = "torchtitan_deltaproduct.train"


@dataclass(frozen=True)
class Layout:
    """Nodes and ranks of a launch, and how the nodes find each other."""

    nodes: int
    ranks_per_node: int
    max_restarts: int = 3
    endpoint: str = ""
    """host:port of the rendezvous; empty on one node, which needs none."""
    run_id: str = ""
    """Name of the rendezvous: random, since who knows it can take part; torchrun makes one up on one node."""
    is_host: bool | None = None
    """Whether this node keeps the rendezvous; None: torchrun compares its name with the endpoint's."""

    def torchrun_arguments(self) -> list[str]:
        """What `launch.torchrun` takes before the program."""
        ranks = [f"--nproc-per-node={self.ranks_per_node}", f"--max-restarts={self.max_restarts}"]
        if not self.endpoint:
            return ["--standalone", *ranks]
        words = [f"--nnodes={self.nodes}", *ranks, "--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}",
                 f"--rdzv-id={self.run_id}"]  # fmt: skip
        return words if self.is_host is None else [*words, f"--rdzv-conf=is_host={str(self.is_host).lower()}"]


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"the first argument must be a TOML file\n{USAGE}")
    config, *overrides = arguments
    layout = layout_of(os.environ)
    words = ["--job.config_file", config, *overrides]
    check(words, layout.nodes * layout.ranks_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads(layout.ranks_per_node)))
    command = [sys.executable, "-m", "launch.torchrun", *layout.torchrun_arguments(), "-m", TRAIN, *words]
    sys.stdout.flush()
    # Signals must reach torchrun, so nothing of this stays above it.
    os.execv(sys.executable, command)


def layout_of(environment: Mapping[str, str]) -> Layout:
    """Reads the variables named in the module docstring.

    Raises:
        ConfigError: one of them is not what it should be.
    """
    nodes = whole_number(environment, "NNODES", 1)
    endpoint = environment.get("RDZV_ENDPOINT", "")
    if endpoint and not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:\[\]]+):\d+", endpoint):
        raise ConfigError(f"RDZV_ENDPOINT={endpoint}: expected host:port, such as node1:29400")
    if nodes > 1 and not endpoint:
        raise ConfigError(f"NNODES={nodes} needs RDZV_ENDPOINT=host:port, the same on every node")
    rank = whole_number(environment, "NODE_RANK", -1, least=0)
    if rank >= nodes:
        raise ConfigError(f"NODE_RANK={rank}: counts from 0, and NNODES={nodes}")
    ranks = whole_number(environment, "NPROC", 0) or devices()
    restarts = whole_number(environment, "MAX_RESTARTS", 3, least=0)
    run_id = environment.get("RDZV_ID", "")
    if endpoint and not re.fullmatch(r"[\w.-]+", run_id):
        raise ConfigError(
            f"RDZV_ID={run_id}: RDZV_ENDPOINT needs a random word beside it, the same on every node\n"
            "make one with: openssl rand -hex 16"
        )
    return Layout(nodes, ranks, restarts, endpoint, run_id, None if rank < 0 else rank == 0)


def whole_number(environment: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    """A variable's value, or the default if it is unset or empty."""
    text = environment.get(name) or ""
    if not text:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}={text}: expected a whole number of at least {least}")
    return int(text)


def devices() -> int:
    """GPUs of this machine, or 1 without any."""
    import torch

    return torch.cuda.device_count() or 1


def check(words: list[str], world_size: int) -> None:
    """Refuses what the ranks would refuse, while nothing has been started.

    Raises:
        ConfigError, DataError: as the trainer would.
    """
    import torch

    from torchtitan_deltaproduct.config import Environment, load_config
    from torchtitan_deltaproduct.data.check import check_data

    check_data(load_config(words, Environment(world_size, torch.cuda.is_available(), files=True)))


if __name__ == "__main__":
    exit_on_user_error(main)

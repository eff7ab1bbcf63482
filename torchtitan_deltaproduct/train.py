"""Train a DeltaProduct language model.

    torchrun --nproc_per_node 8 -m torchtitan_deltaproduct.train train_configs/X.toml
    python -m torchtitan_deltaproduct.train --job.config_file train_configs/quickstart.toml --training.steps 100

A TOML key is overridden by `--section.key value`; `--help` lists them all. A run folder that holds a checkpoint is
continued from the newest complete one. SIGTERM, SIGINT and SIGUSR1 end it after its step, with a complete checkpoint.
"""

import os
import sys
from typing import TYPE_CHECKING

from .errors import exit_on_user_error
from .titan.stopping import Stopping

if TYPE_CHECKING:
    from .config import JobConfig


def load_config(argv: list[str]) -> "JobConfig":
    """As in `config`, which imports torch, and so only here: a signal that comes meanwhile is noted by `Stopping`."""
    from .config import load_config

    return load_config(argv)


def main() -> None:
    with Stopping() as stopping:
        config = load_config(sys.argv[1:])

        from .titan.run import run  # after the config is known to be good: torchtitan takes seconds to import

        run(config, stopping)
    # All is saved and closed. Some of torch's C++ threads may still run, and the interpreter's teardown then aborts now
    # and again ("terminate called without an active exception"), which a launcher would take for a failure.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    exit_on_user_error(main)

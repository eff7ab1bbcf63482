"""Train a DeltaProduct language model.

    torchrun --nproc_per_node 8 -m torchtitan_deltaproduct.train --job.config_file train_configs/X.toml
    python -m torchtitan_deltaproduct.train --job.config_file train_configs/quickstart.toml --training.steps 100

A TOML key is overridden by `--section.key value`; `--help` lists them all. A run folder that holds a checkpoint is
continued from the newest complete one.
"""

import sys

from .config import load_config
from .errors import exit_on_user_error


def main() -> None:
    config = load_config(sys.argv[1:])

    from .titan.run import run  # after the config is known to be good: torchtitan takes seconds to import

    run(config)


if __name__ == "__main__":
    exit_on_user_error(main)

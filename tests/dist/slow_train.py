"""The trainer with pauses at the moments a test wants to hit; each is announced on stdout as `moment save of step 4`.

    PAUSE=0.5 torchrun --nproc_per_node 2 -m tests.dist.slow_train --job.config_file toy.toml

Moments: `startup` (the config is being read), `step S`, `save of step S` (a file is being written), `validation at S`.
HANG="1:5" makes rank 1 hang in step 5 of its first launch. Nothing else of the trainer is changed.
"""

import os
import time

from torchtitan_deltaproduct import train
from torchtitan_deltaproduct.errors import exit_on_user_error

PAUSE = float(os.environ.get("PAUSE", "0.4"))


def moment(name: str) -> None:
    print(f"moment {name} on rank {os.environ.get('RANK', '0')}, pid {os.getpid()}", flush=True)
    time.sleep(PAUSE)


def hang_if_asked(trainer) -> None:
    rank, _, step = os.environ.get("HANG", "").partition(":")
    first_launch = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if rank == os.environ["RANK"] and step == str(trainer.step) and first_launch:
        time.sleep(1e6)


def slowly(trainer) -> None:
    """Puts pauses into a trainer."""
    from torchtitan_deltaproduct.checkpoint.writer import MarkedWriter

    step, batches, write = trainer.train_step, trainer.validator.batches, MarkedWriter.write_data

    def slow_step(feed):
        moment(f"step {trainer.step}")
        hang_if_asked(trainer)
        return step(feed)

    def slow_batches(*given):
        moment(f"validation at {trainer.step}")
        yield from batches(*given)

    def slow_write(writer, *given):
        moment(f"save of step {writer.about.step}")
        return write(writer, *given)

    trainer.train_step, trainer.validator.batches = slow_step, slow_batches
    MarkedWriter.write_data = slow_write


def main() -> None:
    load_config = train.load_config

    def slow_load(argv):
        moment("startup")
        from torchtitan_deltaproduct.titan import run

        build = run.build

        def slow_build(*given):
            trainer = build(*given)
            slowly(trainer)
            return trainer

        run.build = slow_build
        return load_config(argv)

    train.load_config = slow_load
    train.main()


if __name__ == "__main__":
    exit_on_user_error(main)

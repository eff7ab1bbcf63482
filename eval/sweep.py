"""`python -m eval.sweep`: models x datasets x evals from one TOML; how to call it: `evaluation/sweep/__init__.py`."""

import argparse
from functools import partial

from torchtitan_deltaproduct.errors import exit_on_user_error
from torchtitan_deltaproduct.evaluation import sweep


def submit(commands: list[list[str]], asked: sweep.Sweep, options: argparse.Namespace) -> str:
    """Hands commands to SLURM as one array; returns its job id."""
    from launch.sbatch import submit_array
    from launch.site import load_site

    site, _ = load_site(options.site)
    return submit_array(commands, asked.out / "slurm", site, name=asked.file.stem, gpus=options.gpus,
                        time=options.time, max_parallel=options.max_parallel)  # fmt: skip


main = partial(sweep.main, submit=submit)

if __name__ == "__main__":
    exit_on_user_error(main)

"""`python -m eval.sweep`: models x datasets x evals from one TOML; how to call it: `evaluation/sweep/__init__.py`."""

from functools import partial

from launch.sbatch import submit_jobs
from torchtitan_deltaproduct.errors import exit_on_user_error
from torchtitan_deltaproduct.evaluation import sweep

main = partial(sweep.main, submit=submit_jobs)

if __name__ == "__main__":
    exit_on_user_error(main)

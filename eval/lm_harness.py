"""`python -m eval.lm_harness`; how to call it: `evaluation/lm_harness/__init__.py`."""

from torchtitan_deltaproduct.errors import exit_on_user_error
from torchtitan_deltaproduct.evaluation.lm_harness import main

if __name__ == "__main__":
    exit_on_user_error(main)

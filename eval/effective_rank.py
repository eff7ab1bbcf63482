"""`python -m eval.effective_rank`; how to call it: `evaluation/effective_rank/__init__.py`."""

from torchtitan_deltaproduct.errors import exit_on_user_error
from torchtitan_deltaproduct.evaluation.effective_rank import main

if __name__ == "__main__":
    exit_on_user_error(main)

"""`python -m eval.state_tracking`; how to call it: `evaluation/state_tracking/__init__.py`."""

from torchtitan_deltaproduct.errors import exit_on_user_error
from torchtitan_deltaproduct.evaluation.state_tracking import main

if __name__ == "__main__":
    exit_on_user_error(main)

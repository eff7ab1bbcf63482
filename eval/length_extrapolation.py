"""`python -m eval.length_extrapolation`; how to call it: `evaluation/length_extrapolation/__init__.py`."""

from torchtitan_deltaproduct.errors import exit_on_user_error
from torchtitan_deltaproduct.evaluation.length_extrapolation import main

if __name__ == "__main__":
    exit_on_user_error(main)

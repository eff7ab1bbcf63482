"""`python -m eval.generate`; how to call it: `evaluation/generate/__init__.py`."""

from torchtitan_deltaproduct.errors import exit_on_user_error
from torchtitan_deltaproduct.evaluation.generate import main

if __name__ == "__main__":
    exit_on_user_error(main)

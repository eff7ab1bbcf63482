"""`python -m eval.length_extrapolation`: loss by position, far beyond the training length.

How to call it stands at the head of the module that is imported here.
"""

from torchtitan_deltaproduct.errors import exit_on_user_error
from torchtitan_deltaproduct.evaluation.length_extrapolation import main

if __name__ == "__main__":
    exit_on_user_error(main)

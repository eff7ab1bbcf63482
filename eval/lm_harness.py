"""`python -m eval.lm_harness`: the tasks of lm-eval.

How to call it stands at the head of the module that is imported here.
"""

from torchtitan_deltaproduct.errors import exit_on_user_error
from torchtitan_deltaproduct.evaluation.lm_harness import main

if __name__ == "__main__":
    exit_on_user_error(main)

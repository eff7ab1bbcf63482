"""`python -m eval.generate`: prompts in, text out.

How to call it stands at the head of the module that is imported here.
"""

from torchtitan_deltaproduct.errors import exit_on_user_error
from torchtitan_deltaproduct.evaluation.generate import main

if __name__ == "__main__":
    exit_on_user_error(main)

"""`python -m eval.state_tracking`: accuracy on group words and formal languages.

How to call it stands at the head of the module that is imported here.
"""

from torchtitan_deltaproduct.errors import exit_on_user_error
from torchtitan_deltaproduct.evaluation.state_tracking import main

if __name__ == "__main__":
    exit_on_user_error(main)

"""python -m torchtitan_deltaproduct.data.prepare: text to token shards; see text/prepare.py."""

from torchtitan_deltaproduct.errors import exit_on_user_error

from .text.prepare import main

if __name__ == "__main__":
    exit_on_user_error(main)

"""python -m torchtitan_deltaproduct.data.train_tokenizer: text to a vocabulary; see text/train_tokenizer.py."""

from torchtitan_deltaproduct.errors import exit_on_user_error

from .text.train_tokenizer import main

if __name__ == "__main__":
    exit_on_user_error(main)

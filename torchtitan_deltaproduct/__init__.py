"""Distributed pretraining of DeltaProduct linear RNNs on torchtitan (see README.md)."""

import sys

from .errors import begin_command

__version__ = "0.1.0"

# Python writes "-m" there while it looks for the module of `python -m torchtitan_deltaproduct.x`, and only then.
if sys.argv[:1] == ["-m"]:
    begin_command()

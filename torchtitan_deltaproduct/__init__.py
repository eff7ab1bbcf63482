"""Distributed pretraining of DeltaProduct linear RNNs on torchtitan (see README.md)."""

import signal
import sys

__version__ = "0.1.0"

# Python writes "-m" there while it looks for the module of `python -m torchtitan_deltaproduct.x`, no longer when that
# runs. Until `errors.exit_on_user_error` takes over, which is after seconds of importing torch, Ctrl-C then ends the
# command as other programs end, without a traceback.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

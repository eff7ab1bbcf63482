"""Distributed pretraining of DeltaProduct linear RNNs on torchtitan (see README.md)."""

__version__ = "0.1.0"

"""Triton kernels; their launches and the PyTorch around them are in the modules of `ops`."""

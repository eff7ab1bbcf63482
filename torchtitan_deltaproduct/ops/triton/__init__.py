"""Triton kernels of the operator and of what stands before it; the functions that launch them are one folder up."""

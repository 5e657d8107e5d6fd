"""Triton kernels for parts of a training step on a GPU (extra `kernels`)."""

"""Triton kernels by operation (installed as `corelib.kernels`)."""

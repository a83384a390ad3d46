"""Triton kernels, for NVIDIA GPUs of compute capability 8.0 and later; each op has the signature of its pytorch/ twin."""

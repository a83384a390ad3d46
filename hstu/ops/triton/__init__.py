"""Triton kernels, for NVIDIA GPUs of compute capability 8.0 on; each op is called like its pytorch/ twin."""

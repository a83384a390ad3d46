"""Triton kernels for NVIDIA GPUs, with the functions that launch them; dynamic tables import ``slots.py``."""

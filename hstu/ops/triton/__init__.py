"""Triton kernels for NVIDIA GPUs, with the functions that launch them.

``operators.py`` lists the operators for :mod:`hstu.ops.select`. Dynamic tables import ``slots.py``; tools and tests
import ``compile_ahead.py``.
"""

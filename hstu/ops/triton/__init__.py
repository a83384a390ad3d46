"""Triton kernels for NVIDIA GPUs, with the functions that launch them.

``operators.py`` lists the operators for :mod:`hstu.ops.select`; ``support.py`` states the supported shapes and imports
without Triton. Dynamic tables import ``slots.py``; tools and tests import ``compile_ahead.py``.
"""

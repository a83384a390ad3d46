"""Triton kernels for NVIDIA GPUs, with the functions that launch them.

``operators.py`` lists the operators for :mod:`hstu.ops.select`; ``support.py`` says which shapes they serve and imports
without Triton. Besides these, ``slots.py`` is imported by dynamic tables and ``compile_ahead.py`` by tools and tests.
"""

"""CUTLASS kernels (CuTe DSL) of attention for NVIDIA GPUs of compute capability 8.0 and 9.0.

``operators.py`` lists the operators for :mod:`hstu.ops.select`. ``support.py`` says which shapes they serve.
``support.py`` and ``schedule.py`` import without nvidia-cutlass-dsl. ``compile_ahead.py`` is
imported by what compiles without launching, and ``objects.py`` keeps the results on disk.
"""

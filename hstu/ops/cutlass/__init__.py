"""CUTLASS kernels (CuTe DSL) of attention for NVIDIA GPUs of compute capability 8.0 and 9.0.

:mod:`hstu.ops.select` imports ``operators.py``; ``compile_ahead.py`` compiles kernels before a run; ``objects.py``
stores them on disk. ``schedule.py`` imports without nvidia-cutlass-dsl.
"""

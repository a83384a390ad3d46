"""CUTLASS kernels (CuTe DSL) of attention for NVIDIA GPUs of compute capability 8.0 and 9.0.

:mod:`hstu.ops.select` imports ``operators.py`` and ``support.py``, which states the supported shapes.
``compile_ahead.py`` compiles kernels before a run; ``objects.py`` stores them on disk.
``support.py`` and ``schedule.py`` import without nvidia-cutlass-dsl.
"""

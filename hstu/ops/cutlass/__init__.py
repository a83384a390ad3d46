"""CUTLASS kernels (CuTe DSL) of attention for NVIDIA GPUs of compute capability 8.0 and 9.0."""

"""CUTLASS kernels (CuTe DSL) of attention for NVIDIA GPUs of compute capability 9.0."""

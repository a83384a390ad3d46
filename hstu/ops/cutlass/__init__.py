"""CUTLASS kernels (CuTe DSL) for NVIDIA GPUs: attention. All but coverage and schedule need nvidia-cutlass-dsl."""

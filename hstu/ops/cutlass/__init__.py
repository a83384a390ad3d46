"""CUTLASS kernels (CuTe DSL) for NVIDIA GPUs: attention. Their modules need ``nvidia-cutlass-dsl``; coverage does not."""

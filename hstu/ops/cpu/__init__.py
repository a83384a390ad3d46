"""C++ kernels for CPUs, compiled on first use; see build.py."""

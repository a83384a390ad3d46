"""C++ kernels for CPUs, compiled on first use (build.py); operators.py lists them. Sources are in csrc/."""

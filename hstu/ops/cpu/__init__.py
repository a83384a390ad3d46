"""C++ kernels for CPUs: operators.py lists them, build.py compiles them on first use, csrc/ contains the sources."""

"""Reference kernels in plain PyTorch, for every device and dtype: ``operators.REFERENCE_KERNELS``."""

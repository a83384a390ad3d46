"""Kernels: one file an operator with its dispatcher; pytorch/ is the oracle."""

"""Operators of the model and their kernels.

kernels.py defines the interfaces of kernels, and one object per operator with what its kernels take; layout.py the
layout of a batch. Each folder is a backend (pytorch is the reference) whose operators.py lists its kernels; select.py
resolves the kernels of a model once. layer.py and functional.py compute with the kernels that they are handed.
"""

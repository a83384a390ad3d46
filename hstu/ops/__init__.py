"""Operators of the model and their kernels.

types.py defines configurations, the layout of a batch and the interfaces of kernels, and imports no other file of the
package. Each folder is a backend (pytorch is the reference) whose operators.py lists its kernels; select.py resolves
the kernels of a model once. layer.py and functional.py compute with the kernels that they are handed.
"""

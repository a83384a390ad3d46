"""Operators of the model and their kernels.

kernels.py defines the interfaces of the kernels; layout.py defines the layout of a batch. Each folder is a backend
(pytorch is the reference) whose operators.py lists its kernels, and support.py states the shapes that they support.
select.py selects the kernels of a model once. layer.py and functional.py compute with the kernels that they receive.
"""

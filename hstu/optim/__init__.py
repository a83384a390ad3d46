"""Optimizer of the dense part (dense.py); optimizers of a run and their learning-rate schedule (optimizers.py)."""

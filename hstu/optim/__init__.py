"""Optimizers of a run and their learning-rate schedule (optimizers.py)."""

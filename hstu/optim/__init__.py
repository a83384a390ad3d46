"""Optimizers and learning-rate schedule.

dense.py updates the dense part, with part_optimizers and a moving average. optimizers.py combines it with the table
optimizer of hstu.parallel, and has the learning-rate schedule.
"""

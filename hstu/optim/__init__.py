"""What updates the weights, once gradients are known.

dense.py trains the dense part, with part_optimizers and a moving average. optimizers.py combines it with the table
optimizer of hstu.parallel, and has the schedule of the learning rates.
"""

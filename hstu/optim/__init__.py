"""What updates the weights, once gradients are known.

dense.py trains the dense part, with part_optimizers and a moving average. optimizers.py combines it with the table
optimizer of hstu.parallel. schedule.py gives the learning-rate multiplier, loss_scale.py the loss scale of float16.
"""

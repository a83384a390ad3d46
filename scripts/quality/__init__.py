"""How good the models are: runs over seeds, and other methods (peers) on the same data and targets.

The files are commands. What they share is imported as ``scripts.quality.x``, with the checkout on Python's path.
"""

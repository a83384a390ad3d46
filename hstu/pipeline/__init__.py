"""How a training step overlaps with the batches that follow."""

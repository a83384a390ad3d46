"""Everything that spreads the model over ranks, applied from outside the model."""

"""Builder, training loop and evaluation."""

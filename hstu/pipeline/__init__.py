"""The training step (step.py), its finite check and stop signals (finite.py), and its overlap (pipelines.py)."""

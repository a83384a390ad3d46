"""Which events form which sample (samples.py), and which samples form which batch (sampler.py)."""

"""Which events a split holds (splits.py), which of them form which sample (samples.py), and which samples form which
batch (sampler.py)."""

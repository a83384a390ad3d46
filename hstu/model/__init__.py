"""The HSTU model; no parallelism in here beyond layers that are handed in."""

"""What a run shows: its directory, log, throughput, profile and plots; and the watchdog that ends a stuck run.

The builder, the trainer and the entry points import from here. environment.py needs no torch, so that it can report a
missing package before anything else is imported.
"""

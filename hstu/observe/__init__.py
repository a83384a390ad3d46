"""Observes a run: its directory, log, throughput, profile and plots, and the watchdog that ends a stuck run.

The builder, the trainer and the entry points import from here. environment.py works without torch, so it can report
missing packages first.
"""

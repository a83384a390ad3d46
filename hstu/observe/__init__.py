"""Observes a run: directory, log, throughput, profile and plots, and the watchdog that ends a stuck run."""

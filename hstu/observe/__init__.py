"""Observes a run: directory, log, throughput, profile and plots, and the watchdog that ends a stuck run.

environment.py works without torch, so it can report missing packages first.
"""

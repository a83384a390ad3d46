"""Builds a run from its configuration, trains it, evaluates it, and recommends items with it.

Entry points call main.py. hstu.api and hstu/estimate also import builder.py, corpus.py, evaluate.py, flops.py and the
sources of batches: sources.py opens the one that a configuration names.
"""

"""Builds a run from its configuration, trains it, evaluates it, and recommends items with it.

Entry points call main.py. hstu.api and hstu/estimate also import builder.py, evaluate.py, sources.py and flops.py.
"""

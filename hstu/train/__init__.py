"""Builds a run from its configuration, trains and evaluates it, and recommends items.

Entry points call main.py. hstu.api and hstu/estimate also import builder.py, corpus.py, evaluate.py and the batch
sources, which sources.py opens. importing.py makes a model of this trainer from a checkpoint of another one.
"""

"""From raw files to batches. Packages above this one may import any of these files.

datasets/ declares the datasets and preprocess/ turns raw files into a sequence store (store/). features/ defines what
models read, sampling/ forms samples and batches and draws negatives, and batches/ builds the batches.
rules.py holds the configuration rules that need the registry of datasets.
"""

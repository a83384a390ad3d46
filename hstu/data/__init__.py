"""From raw files to batches; later rooms may import any of these files.

datasets/ declares the datasets, preprocess/ turns raw files into a sequence store (store/). features/ says what a model
sees of the data, sampling/ which events form which batch and which negatives are drawn, batches/ reads and builds it.
rules.py has the rules of a configuration that need the registry of datasets.
"""

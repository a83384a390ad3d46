"""The sequence store: a dataset as a directory of memory-mapped arrays.

sequence_store.py opens one, reader.py reads samples of it, writer.py writes it; layout.py and meta.py say what it
consists of.
"""

"""The sequence store: a dataset as a directory of memory-mapped arrays.

sequence_store.py opens a store, reader.py reads its samples, writer.py writes it. layout.py and meta.py define files.
popularity.py counts events of items.
"""

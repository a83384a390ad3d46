"""Errors, files, locks, hashes, topics, figures, processes, shipped files: for all others. Imports none of them."""

"""Errors, files, locks, hashes, figures, processes, shipped files: for all other packages. Imports none of them."""

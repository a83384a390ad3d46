"""Errors, files, locks, hashes, figures and child processes for all other packages. Imports none of them."""

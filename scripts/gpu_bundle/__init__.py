"""A folder of at most 48 MiB with all that training needs and a GPU machine without a package index lacks.

``make`` builds it on a machine without a GPU. ``unpack`` and ``activate.sh`` are copied into it and use Python's
standard library alone. ``libraries`` makes compiled libraries small. ``touched_pages`` finds the code that a compiler
executes.
"""

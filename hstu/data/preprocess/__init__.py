"""Converts raw files of any size to a sequence store.

build.py runs the stages in ingest.py, features.py and write.py, which share state.py, with DuckDB. base.py and merge.py
add events to an existing store, and remove users from it. download.py fetches raw files, report.py describes a store,
and starter.py writes gin files for it.
Import ``preprocess``, ``import_interactions``, ``forget`` and ``InteractionColumns`` from here.
"""

from hstu.data.datasets.own_columns import InteractionColumns
from hstu.data.preprocess.build import DATA_DIRECTORY, forget, import_interactions, preprocess

__all__ = ["DATA_DIRECTORY", "InteractionColumns", "forget", "import_interactions", "preprocess"]

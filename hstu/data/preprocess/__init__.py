"""Raw files → sequence store, out of core: build.py runs the stages, ingest.py, features.py and write.py are stages.

state.py holds what the stages share, engine.py DuckDB with its limits of memory and disk, download.py fetches the raw
files, report.py describes the finished store, starter.py writes gin files for it. Import ``preprocess``,
``import_interactions`` and ``InteractionColumns`` from here.
"""

from hstu.data.datasets.own_columns import InteractionColumns
from hstu.data.preprocess.build import DATA_DIRECTORY, import_interactions, preprocess

__all__ = ["DATA_DIRECTORY", "InteractionColumns", "import_interactions", "preprocess"]

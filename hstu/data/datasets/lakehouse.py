"""Delta and Iceberg tables as raw data: the Parquet files of their current snapshot.

The directory of a table also has files of earlier snapshots. deltalake and pyiceberg read which files are current. A
table whose rows are not those of these files, column by column, is refused.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

from hstu.base import remote
from hstu.base.errors import ConfigError, DataError, UserError
from hstu.data.store.parquet_files import open_dataset

_log = logging.getLogger(__name__)
_DELTA, _ICEBERG, _METADATA = "_delta_log", "metadata", ".metadata.json"
_HARMLESS = {"columnMapping", "timestampNtz", "typeWidening", "v2Checkpoint", "vacuumProtocolCheck", "variantType"}
"""Features with which a Delta table has the rows of its files, if no column is mapped."""
_REWRITE = "Run rewrite_data_files in Spark for all files"


def snapshot(place: str) -> dict[str, int] | None:
    """Path or URL of each Parquet file of a table as it is now → bytes, ascending; None if ``place`` is no table.

    ``place``: directory of a Delta or Iceberg table, or the ``….metadata.json`` of an Iceberg table; a path or a URL.
    Raises DataError if the files do not say all about the rows, ConfigError if the library for the table is missing.
    """
    if (metadata := _metadata_of(place)) is None:
        return None
    try:
        found = dict(_delta_files(place) if metadata == _DELTA else _iceberg_files(metadata))
    except UserError:
        raise
    except ImportError as error:
        needed = f'this table needs {error.name}, which is not installed: pip install "hstu-trainer[lakehouse]"'
        raise ConfigError(f"{place}: {needed}") from error
    except Exception as error:  # of many libraries
        raise DataError(f"{place}: this table cannot be read: {str(error).splitlines()[0]}") from error
    if not found:
        raise DataError(f"{place}: this table has no rows")
    return dict(sorted(found.items()))


def live_files(path: str | Path) -> tuple[Path, ...] | None:
    """Local copies of the files of ``snapshot``; None if ``path`` is no table. Raises as ``snapshot``."""
    if (files := snapshot(remote.url_of(path) or str(path).removeprefix("file://"))) is None:
        return None
    if remote.url_of(next(iter(files))) is None:
        return tuple(map(Path, files))
    root = os.path.commonpath(map(os.path.dirname, files)).replace(":/", "://", 1)
    names = {file.removeprefix(f"{root}/"): {"bytes": size} for file, size in files.items()}
    copies = (cache := remote.Cache.of()).place(root)
    remote.copy_files(root, copies, names, cache)
    return tuple(copies / name for name in names)


def root_of(place: str) -> str | None:
    """The directory of a table, a path or a URL; None if ``place`` is no table."""
    if place.endswith(_METADATA):
        return place.rpartition(f"/{_ICEBERG}/")[0]
    return None if _metadata_of(place) is None else place


def _names_in(place: str) -> list[str]:
    if remote.url_of(place):
        return [] if place.startswith("http") else remote.names_in(place)  # web servers list no files
    return os.listdir(place) if os.path.isdir(place) else []


def _refused(place: str, why: str, remedy: str) -> DataError:
    return DataError(
        f"{place}: {why}, so the rows of its Parquet files are not those of the table. {remedy}, or write the rows as "
        "Parquet files and give their directory"
    )


def _delta_files(place: str) -> Iterator[tuple[str, int]]:
    import deltalake
    import pyarrow

    table = deltalake.DeltaTable(remote.stage(f"{place}/{_DELTA}", raw=True).parent)
    features = {*(table.protocol().reader_features or ())}
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        raise _refused(place, "delta.columnMapping.mode gives its columns other names in its files", "Copy the table")
    is_deleted = "deletionVectors" in features
    with suppress(Exception):  # vectors in files, which are not beside the copy of a log
        is_deleted = any(batch.num_rows for batch in table.deletion_vectors())
    if is_deleted:
        raise _refused(place, "deletion vectors mark rows as deleted", "Run REORG TABLE … APPLY (PURGE) in Spark")
    if unknown := sorted(features - _HARMLESS - {"deletionVectors"}):
        raise _refused(place, f"it uses {', '.join(unknown)}", "Copy it to a table without this feature")
    added = pyarrow.table(table.get_add_actions()).to_pylist()
    _log.info("%s: version %d of a Delta table, in %d files", place, table.version(), len(added))
    for file in added:
        if re.match(r"/|\w+:", name := unquote(file["path"])):
            raise _refused(place, f"it is a shallow clone, with rows in {name}", "Make a deep clone")
        yield f"{place}/{name}", file["size_bytes"]


def _metadata_of(table: str) -> str | None:
    """The newest metadata of an Iceberg table, which has the highest number, or what is given; of a Delta table its
    log; None of what is no table."""
    if table.endswith(_METADATA):
        return table
    names = _names_in(table)
    if _DELTA in names or _ICEBERG not in names:
        return _DELTA if _DELTA in names else None
    found = {name: re.match(rf"v?(\d+).*{_METADATA}$", name) for name in _names_in(f"{table}/{_ICEBERG}")}
    numbers = {name: int(number[1]) for name, number in found.items() if number}
    if not numbers:
        return None
    newest = [name for name, number in numbers.items() if number == max(numbers.values())]
    if len(newest) > 1:
        raise DataError(f"{table}: {' and '.join(newest)} are equally new; give the path of the one in the catalog")
    return f"{table}/{_ICEBERG}/{newest[0]}"


class _Content:
    """An InputFile of pyiceberg."""

    def __init__(self, location: str) -> None:
        self.location = location

    def open(self, seekable: bool = True) -> io.BytesIO:
        """The bytes of the file. Raises DataError."""
        return io.BytesIO(remote.retried(self.location, lambda files, path: files.cat_file(path)))


def _iceberg_files(place: str) -> Iterator[tuple[str, int]]:
    from pyiceberg.catalog.noop import NoopCatalog
    from pyiceberg.serializers import FromInputFile
    from pyiceberg.table import StaticTable

    content: Any = _Content
    source: Any = SimpleNamespace(new_input=_Content)
    state = FromInputFile.table_metadata(content(place))
    table = StaticTable(("table",), state, place, source, NoopCatalog("none"))
    files: dict[str, int] = {}
    for task in table.scan().plan_files():
        if task.delete_files or task.file.file_format != "PARQUET":
            why = (
                "delete files mark rows as deleted"
                if task.delete_files
                else f"{task.file.file_path} is no Parquet file"
            )
            raise _refused(place, why, _REWRITE)
        files[re.sub("^file:/+", "/", task.file.file_path)] = task.file.file_size_in_bytes
    _log.info("%s: snapshot %s of an Iceberg table, in %d files", place, state.current_snapshot_id, len(files))
    mapping, ids = table.name_mapping(), {field.name: field.field_id for field in table.schema().fields}
    mapped: dict[str, Any] = {
        name: field.field_id for field in (mapping.root if mapping else ()) for name in field.names
    }
    for file, fragment in zip(files, open_dataset(files).get_fragments() if files else (), strict=True):
        for field in fragment.physical_schema:
            number = int((field.metadata or {}).get(b"PARQUET:field_id", mapped.get(field.name, -1)))
            if (field.name in ids or number in ids.values()) and ids.get(field.name) != number:
                raise _refused(place, f"{field.name!r} of {file} is another column in the table", _REWRITE)
    yield from files.items()

"""Delta and Iceberg tables as raw data: the rows that a table has now, or an error."""

import json
import shutil
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu.base.errors import ConfigError, UserError
from hstu.data.preprocess import build
from hstu.data.store.sequence_store import SequenceStore
from tests.data.own_tables import own_store
from tests.data.preprocess.test_restart import arrays
from tests.object_store import BUCKET, object_store

deltalake = pytest.importorskip("deltalake", reason='deltalake is missing: pip install ".[lakehouse]"')
catalogs = pytest.importorskip("pyiceberg.catalog.sql", reason='pyiceberg is missing: pip install ".[lakehouse]"')
COLUMNS: dict[str, Any] = {"time": "t", "event_columns": ("e",), "any_times": True}


def rows(seed: int, number: int = 200) -> pa.Table:
    """Each row has a time of its own, so that a store does not depend on the files of its rows."""
    random = np.random.default_rng(seed)
    columns = {name: random.integers(0, most, number) for name, most in {"u": 30, "i": 50, "e": 4, "day": 3}.items()}
    return pa.table(columns | {"t": np.arange(number) * 10 + seed})


def delta(folder: Path, **options: Any) -> Path:
    """A table of which rows were deleted and changed, and files compacted."""
    for seed in range(3):
        deltalake.write_deltalake(folder, rows(seed), mode="append", **options)
    deltalake.DeltaTable(folder).delete("u < 4")
    deltalake.DeltaTable(folder).update(predicate="i = 7", updates={"i": "70"})
    deltalake.DeltaTable(folder).optimize.compact()
    deltalake.DeltaTable(folder).create_checkpoint()
    deltalake.write_deltalake(folder, rows(3), mode="append", **options)
    return folder


def iceberg(folder: Path, place: str | None = None) -> Any:
    """A table of which rows were deleted and replaced, in ``db/events`` of ``place``."""
    folder.mkdir(exist_ok=True)
    given = {"uri": f"sqlite:///{folder}/c.db", "py-io-impl": "pyiceberg.io.fsspec.FsspecFileIO"}
    catalog = catalogs.SqlCatalog("c", **given, warehouse=place or f"file://{folder}")
    catalog.create_namespace("db")
    table = catalog.create_table("db.events", schema=rows(0).schema)
    for seed in range(3):
        table.append(rows(seed))
    table.delete("u < 4")
    table.overwrite(rows(9, 40), "i = 7")
    return table


def made(folder: Path, table: Any, store: str = "store", **given: Any) -> SequenceStore:
    return own_store(folder, table, store=store, **(COLUMNS | given))


def expected(folder: Path, table: pa.Table) -> dict[str, bytes]:
    pq.write_table(table, folder / "rows.parquet")
    return arrays(made(folder, folder / "rows.parquet", "of_rows"))


def refused(folder: Path, table: Any, **given: Any) -> str:
    with pytest.raises(UserError) as error:
        made(folder, table, **given)
    return str(error.value)


@pytest.mark.parametrize("options", [{}, {"partition_by": ["day"]}], ids=["whole", "partitioned"])
def test_a_delta_table_has_the_rows_of_its_version(tmp_path: Path, options: dict[str, Any]) -> None:
    table = delta(tmp_path / "a table", **options)
    rows_now = deltalake.DeltaTable(table).to_pyarrow_table()
    assert arrays(made(tmp_path, table)) == expected(tmp_path, rows_now)
    assert sum(pq.read_metadata(file).num_rows for file in table.rglob("*.parquet")) > 2 * len(rows_now)
    if options:
        assert "There 'day' is a name of directories" in refused(tmp_path, table, store="other", event_columns=("day",))


def test_an_iceberg_table_has_the_rows_of_its_snapshot(tmp_path: Path) -> None:
    table = iceberg(tmp_path / "w")
    store, now = made(tmp_path, tmp_path / "w/db/events"), expected(tmp_path, table.scan().to_arrow())
    assert arrays(store) == now
    before = table.metadata_location.removeprefix("file://")
    table.append(rows(5))
    assert arrays(made(tmp_path, Path(before), "before")) == now
    assert made(tmp_path, tmp_path / "w/db/events", "after").num_events == store.num_events + 200
    newest = table.metadata_location.removeprefix("file://")
    shutil.copy(newest, newest.replace(Path(newest).name[6:12], "copied"))
    assert "are equally new" in refused(tmp_path, tmp_path / "w/db/events", store="other")


def test_tables_in_a_bucket_are_as_local_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with object_store() as store:
        for name, value in {**store.environment, "XDG_CACHE_HOME": str(tmp_path / "home")}.items():
            monkeypatch.setenv(name, value)
        here, there = delta(tmp_path / "d"), f"s3://{BUCKET}/d"
        fsspec.filesystem("s3").put(str(here), there, recursive=True)
        assert arrays(made(tmp_path, [there], "s3")) == arrays(made(tmp_path, here))
        table = iceberg(tmp_path / "w", f"s3://{BUCKET}/w")
        stored = made(tmp_path, f"s3://{BUCKET}/w/db/events", "ice")
        assert arrays(stored) == expected(tmp_path, table.scan().to_arrow())
        assert f"s3://{BUCKET}/w/db/events/data/" in str(stored.command)


def test_a_run_has_the_rows_of_the_version_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = delta(tmp_path / "d")
    now = expected(tmp_path, deltalake.DeltaTable(table).to_pyarrow_table())
    monkeypatch.setattr(build, "memory_bytes", lambda limit: deltalake.DeltaTable(table).delete("u < 20"))
    assert arrays(made(tmp_path, table)) == now
    assert deltalake.DeltaTable(table).version() == 6


def test_append_adds_new_files_of_a_table_and_refuses_one_that_lost_rows(tmp_path: Path) -> None:
    table = delta(tmp_path / "d")
    made(tmp_path, table)
    deltalake.write_deltalake(table, rows(7), mode="append")
    assert arrays(made(tmp_path, table, append=True)) == arrays(made(tmp_path, table, "at_once"))
    deltalake.DeltaTable(table).delete("u < 20")
    assert "is no longer in its table" in refused(tmp_path, table, append=True)


def test_a_lake_may_be_a_table(tmp_path: Path) -> None:
    users = pa.table({"user": range(4), "items": [[1, 2], [3], [4, 5], [6]]})
    deltalake.write_deltalake(tmp_path / "d", users)
    deltalake.DeltaTable(tmp_path / "d").delete("user = 1")
    (tmp_path / "lake.json").write_text(json.dumps({"files": "d", "user": "user", "item": "items"}))
    assert SequenceStore.open(tmp_path).num_events == 5


def test_rows_that_the_files_alone_do_not_say_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / "named"
    deltalake.write_deltalake(named, rows(0), configuration={"delta.columnMapping.mode": "name"})
    assert "delta.columnMapping.mode gives" in refused(tmp_path, named)
    table = iceberg(tmp_path / "w")
    with table.update_schema() as update:
        update.rename_column("e", "kind").add_column("new", table.schema().find_type("i"))
    assert "'e' of" in refused(tmp_path, tmp_path / "w/db/events", event_columns=("kind",))
    plain = delta(tmp_path / "plain")
    assert "give --time" in refused(tmp_path, plain, time=None)
    assert "--items is one file" in refused(tmp_path, plain, items=plain, item_columns=("day",))
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(ConfigError, match=r"needs deltalake, which is not installed: pip install .*\[lakehouse\]"):
        made(tmp_path, plain)


def replace(table: Path, **changes: Any) -> None:
    """Write version 1 of a Delta table, which removes the file of version 0 and adds it with other attributes."""
    log = table / "_delta_log"
    added = next(line for line in map(json.loads, (log / f"{0:020}.json").open()) if "add" in line)["add"]
    removed = {"path": added["path"], "dataChange": True, "deletionTimestamp": 1}
    lines = map(json.dumps, ({"remove": removed}, {"add": added | changes}))
    (log / f"{1:020}.json").write_text("\n".join(lines))


def test_a_shallow_clone_and_a_feature_of_the_future_are_refused(tmp_path: Path) -> None:
    for name in ("original", "clone", "future"):
        deltalake.write_deltalake(tmp_path / name, rows(0))
    (file,) = (tmp_path / "original").glob("*.parquet")
    for place in (f"{file}", f"file://{file}"):
        replace(tmp_path / "clone", path=place)
        assert f"it is a shallow clone, with rows in {place}," in refused(tmp_path, tmp_path / "clone")
    features = {"readerFeatures": ["x"], "writerFeatures": ["x"]}
    protocol = {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **features}}
    (tmp_path / "future" / "_delta_log" / f"{1:020}.json").write_text(json.dumps(protocol))
    assert "Feature 'x' is not supported" in refused(tmp_path, tmp_path / "future")


def test_delete_files_of_iceberg_are_refused(tmp_path: Path) -> None:
    from pyiceberg import manifest

    table = iceberg(tmp_path / "w")
    now, file, deletes = len(table.scan().to_arrow()), next(iter(table.scan().plan_files())).file, tmp_path / "deletes"
    ids = {"file_path": (pa.string(), "2147483546"), "pos": (pa.int64(), "2147483545")}  # of Iceberg's specification
    schema = pa.schema([pa.field(name, kind, metadata={"PARQUET:field_id": id_}) for name, (kind, id_) in ids.items()])
    pq.write_table(pa.table({"file_path": [file.file_path], "pos": [0]}, schema=schema), deletes)
    added = manifest.DataFile.from_args(
        content=manifest.DataFileContent.POSITION_DELETES, file_path=f"file://{deletes}", partition=file.partition,
        file_format=manifest.FileFormat.PARQUET, record_count=1, file_size_in_bytes=deletes.stat().st_size,
    )  # fmt: skip
    added.spec_id = 0
    with table.transaction() as change, change.update_snapshot().fast_append() as files:
        files.append_data_file(added)
    assert len(table.scan().to_arrow()) == now - 1
    assert "delete files mark rows as deleted" in refused(tmp_path, tmp_path / "w/db/events")


@pytest.mark.parametrize("is_there", [True, False])
def test_deletion_vectors_are_refused_where_there_are_some(tmp_path: Path, is_there: bool) -> None:
    pyroaring = pytest.importorskip("pyroaring")
    table = tmp_path / "d"
    deltalake.write_deltalake(table, rows(0), configuration={"delta.enableDeletionVectors": "true"})
    assert made(tmp_path, table).num_events == 200
    content = struct.pack("<I", 1681511377) + pyroaring.BitMap64([0, 5]).serialize()
    vector = b"\1" + struct.pack(">I", len(content)) + content + struct.pack(">I", zlib.crc32(content))
    (tmp_path / "v.bin").write_bytes(vector if is_there else b"")
    described = {"storageType": "p", "pathOrInlineDv": f"file://{tmp_path}/v.bin", "offset": 1, "cardinality": 2}
    replace(table, deletionVector=described | {"sizeInBytes": len(content)})
    assert deltalake.DeltaTable(table).version() == 1
    assert "deletion vectors mark rows as deleted" in refused(tmp_path, table, store="other")

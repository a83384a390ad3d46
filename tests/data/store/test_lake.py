"""A lake of Parquet files is read as the store with the same users, and its mistakes are named with file and column."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu.base.errors import DataError
from hstu.data.store.sequence_store import SequenceStore
from tests.helpers import error_of

OPTIONS = {
    "user": "who", "item": "film", "action": "stars", "time": "at", "context_columns": ["who", "region"],
    "event_columns": ["device"],
}  # fmt: skip
ROWS: dict[str, Any] = {
    "who": [3, 5, 8, 9, 12],
    "region": [0, 1, 0, 2, 1],
    "film": [[1, 4], [2], [0, 1, 6], [5, 5], [3]],
    "stars": [[1, 0], [1], [0, 0, 1], [1, 1], [0]],
    "at": [[10, 20], [5], [7, 7, 9], [1, 2], [30]],
    "device": [[0, 1], [2], [0, 0, 0], [1, 3], [0]],
    "note": ["a", "b", "c", "d", "e"],
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_lake(
    directory: Path, rows: dict[str, list[Any]] | None = None, cuts: tuple[int, ...] = (2,), **options: Any
) -> Path:
    """A lake whose files end before these rows, and at the end."""
    directory.mkdir(parents=True)
    (directory / "lake.json").write_text(json.dumps(OPTIONS | options))
    table = pa.table(ROWS if rows is None else rows)
    for number, (begin, end) in enumerate(zip((0, *cuts), (*cuts, len(table)), strict=True)):
        pq.write_table(table.slice(begin, end - begin), directory / f"part-{number}.parquet", row_group_size=2)
    return directory


def flat(lists: list[list[int]]) -> list[int]:
    return [*chain.from_iterable(lists)]


def events(store: SequenceStore) -> dict[str, list[int]]:
    return {name: np.asarray(store.sequence(name)).tolist() for name in ("film", "stars", "at", "device")}


@pytest.mark.parametrize("cuts", [(), (2,), (0, 1, 1, 4)])
def test_rows_are_users_and_lists_are_events_in_any_number_of_files(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    store = SequenceStore.open(write_lake(tmp_path / "lake", cuts=cuts))
    assert store.offsets().tolist() == [0, 2, 3, 6, 8, 9]
    assert events(store) == {name: flat(ROWS[name]) for name in ("film", "stars", "at", "device")}
    assert store.raw_ids("user_id").tolist() == ROWS["who"] and store.context("region").tolist() == ROWS["region"]
    assert {name: store.cardinality(name) for name in ("film", "stars", "device", "region", "user_id")} == {
        "film": 7, "stars": 2, "device": 4, "region": 3, "user_id": 5,
    }  # fmt: skip
    assert store.sequence("film").dtype == np.int32 and store.sequence("at").dtype == np.int64
    store.verify_contents()


def test_only_the_columns_and_files_that_are_read_become_arrays(tmp_path: Path, cache: Path) -> None:
    store = SequenceStore.open(write_lake(tmp_path / "lake", cuts=(1, 2, 3, 4)))
    assert not [*cache.rglob("sequence.*.npy")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hstu.data.store.lake._THREADS", 1)
        assert store.sequence("film")[3:6].tolist() == [0, 1, 6]
    assert [path.parent.name for path in cache.rglob("sequence.*.npy")] == ["shard.00002"]


def test_where_keeps_rows_by_columns_and_by_directories(tmp_path: Path) -> None:
    lake = write_lake(tmp_path / "lake", cuts=(2, 4), where=[["day", ">=", 2], ["note", "!=", "d"]])
    for day in (1, 2, 3):
        (lake / f"day={day}").mkdir()
        (lake / f"part-{day - 1}.parquet").rename(lake / f"day={day}/part.parquet")
    store = SequenceStore.open(lake)
    assert store.raw_ids("user_id").tolist() == [8, 12] and events(store)["film"] == [0, 1, 6, 3]


def test_raw_ids_of_items_may_be_any_numbers(tmp_path: Path) -> None:
    films = [[-5, 2**40], [7], [2**40, 7, 0], [3, 3], [-5]]
    store = SequenceStore.open(write_lake(tmp_path / "lake", ROWS | {"film": films}, raw_ids=["item"]))
    assert store.raw_ids("film").tolist() == [-5, 0, 3, 7, 2**40] and store.feature("film").raw
    assert store.model_ids("film", store.sequence("film")[:]).tolist() == flat(films)


def test_users_in_any_order_and_users_of_text_are_found_by_their_ids(tmp_path: Path) -> None:
    for name, ids in (("numbers", [9, 3, 12, 5, 8]), ("texts", ["ü", "b", "", "abc", "a"])):
        store = SequenceStore.open(write_lake(tmp_path / name, ROWS | {"who": ids}, context_columns=[]))
        assert store.raw_ids("user_id").tolist() == ids
        assert store.encode("user_id", ids[::-1]).tolist() == [4, 3, 2, 1, 0]
        with pytest.raises(DataError, match="not in the vocabulary"):
            store.encode("user_id", [ids[0] * 7])


def test_times_have_the_unit_of_their_type_or_of_the_description(tmp_path: Path) -> None:
    seconds = flat(ROWS["at"])
    kind = pa.list_(pa.timestamp("us"))
    typed = ROWS | {"at": pa.array([[time * 10**6 + 3 for time in times] for times in ROWS["at"]], type=kind)}
    assert events(SequenceStore.open(write_lake(tmp_path / "typed", typed)))["at"] == seconds
    numbers = ROWS | {"at": [[time * 1000 for time in times] for times in ROWS["at"]]}
    assert events(SequenceStore.open(write_lake(tmp_path / "ms", numbers, time_unit="ms")))["at"] == seconds


def test_the_state_is_that_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    first, second, other = (
        SequenceStore.open(write_lake(tmp_path / name, rows))
        for name, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS | {"region": [0, 1, 0, 2, 2]}))
    )
    assert first.lineage == second.lineage != other.lineage


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no such column": ({}, {"action": "clicks"}, "column 'clicks', which is missing; the file has who, region"),
    "no list": ({"stars": [1, 0, 1, 0, 1]}, {}, "column 'stars', of type int64; allowed: lists of whole numbers"),
    "texts": ({"film": [["x"]] * 5}, {}, "column 'film', of type list<"),
    "negative": ({"film": [[1, 4], [2], [0, -1, 6], [5, 5], [3]]}, {}, "column 'film', has the value -1; allowed"),
    "empty": ({"film": [[1, 4], [2], [0, 1, 6], [], [3]]}, {}, "part-1.parquet: column 'film', row 1 (the first"),
    "null list": ({"film": [[1, 4], [2], [0, 1, 6], None, [3]]}, {}, "row 1 (the first is row 0): it is null"),
    "null user": ({"who": [3, 5, 8, None, 12]}, {}, "column 'who', row 1 (the first is row 0): it is null"),
    "lengths": ({"stars": [[1, 0], [1], [0, 1], [1, 1], [0]]}, {}, "row 0 (the first is row 0): it has not as many"),
    "null value": ({"stars": [[1, 0], [1], [0, 0, 1], [1, 1], [None]]}, {}, "row 2 (the first is row 0): it holds a"),
    "time": ({"at": [[10, 20], [5], [7, 6, 9], [1, 2], [30]]}, {}, "column 'at', row 0 (the first is row 0): its tim"),
    "twice": ({"who": [3, 5, 8, 8, 12]}, {}, "user 8 has several rows"),
    "order": ({"who": [5, 3, 8, 9, 12]}, {}, "column 'who', is in context_columns, and the rows"),
    "key": ({}, {"items": "film"}, "lake.json: 'items' is unknown; allowed: user, item"),
    "unit": ({}, {"time_unit": "min"}, "time_unit is one of s, ms, us, ns"),
    "nobody": ({}, {"where": [["region", "=", 7]]}, "the files have no rows that 'where' keeps"),
    "no file": ({}, {"files": "elsewhere"}, "elsewhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_file_column_and_row(tmp_path: Path, mistake: str) -> None:
    rows, options, expected = MISTAKES[mistake]
    lake = write_lake(tmp_path / "lake", ROWS | rows, **options)
    read: Callable[[], Any] = lambda: SequenceStore.open(lake).verify_contents()  # noqa: E731
    assert expected in error_of(read, DataError)


def test_a_file_that_changes_during_a_run_is_refused(tmp_path: Path) -> None:
    store = SequenceStore.open(lake := write_lake(tmp_path / "lake"))
    pq.write_table(pa.table(ROWS).slice(0, 2), lake / "part-0.parquet", compression="zstd")
    with pytest.raises(DataError, match=r"part-0\.parquet has changed since this run began"):
        store.sequence("film")[0]

"""A lake read as it is: Parquet files whose rows are users, each with lists of the user's events.

A directory with ``lake.json`` is a lake. Its keys are options of ``preprocess_dataset.py``, which name columns:
``user``, ``item``, ``action``, ``time``, ``time_unit``, ``context_columns``, ``event_columns``,
``raw_ids``. Two are its own:

    files   directory or URL (s3://, gs://, …) of the Parquet files. Without it: the directory of lake.json
    where   [[column, operator, value], …]: only rows that satisfy all. A directory ``day=2026-11-01`` is a column

Users have the order of the files' paths and of the rows. The lake is a store in shards, one per file, in the cache for
URLs (``remote.Cache``). What has a value per user is read when the lake is first opened, a column of the events of a
file when one of its values is first read, and again if others needed its room.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from hstu.base import remote
from hstu.base.errors import DataError, UserError
from hstu.base.files import remove, written_aside
from hstu.base.ids import codes_of
from hstu.base.json_shape import check_shape
from hstu.base.remote import LAKE_FILE
from hstu.data.batches.jagged import run_offsets
from hstu.data.datasets.lakehouse import snapshot
from hstu.data.datasets.spec import TIME_UNITS, USER_FEATURE
from hstu.data.store.layout import (
    DTYPES,
    META_FILE,
    OFFSETS_FILE,
    FeatureMeta,
    Role,
    shard_file,
    strings_files,
    vocabulary_stem,
)
from hstu.data.store.meta import StoreFiles, read_meta, remedy
from hstu.data.store.parquet_files import files_below, open_dataset

_ROLES: dict[str, Role] = {"item": "item", "action": "action", "time": "timestamp"}
_SHAPE = {
    "user": str, "item": str, "action?": str, "time?": str, "time_unit?": str, "context_columns?": [str],
    "event_columns?": [str], "raw_ids?": [str], "files?": str, "where?": [list],
}  # fmt: skip
_ROWS_PER_BATCH = 4096
_MOST_CODES = 2**31 - 1
_HEADER_BYTES = 128
"""Of a file of NumPy's with one dimension."""
_THREADS = len(os.sched_getaffinity(0))
_log = logging.getLogger(__name__)


def describe(path: Path) -> dict[str, Any]:
    """The description of a store (``read_meta``), or of a lake from ``remote.stage``, whose users are read when it
    is first opened."""
    if os.path.isfile(path / LAKE_FILE):  # Path.is_file raises for a name that is too long
        return Lake(path).describe()
    try:
        return read_meta(path)
    except DataError as error:
        raise DataError(f"{error}. {remedy(path, None)}") from error


def files_of(path: Path, meta: Mapping[str, Any], most_open: int | None) -> StoreFiles:
    """The arrays of what ``describe`` describes. ``most_open``: see StoreFiles."""
    return LakeFiles(path, meta, most_open) if "lake" in meta else StoreFiles(path, meta, most_open)


class Lake:
    """The files and the columns of a lake. Whatever reads them raises a DataError with file, column and row."""

    def __init__(self, path: Path) -> None:
        """Reads lake.json and lists the files. ``path``: see ``remote.stage``. Raises DataError for wrong keys and
        values, or if there is no file."""
        staged = remote.origin(path)
        assert staged is not None, path
        self.given, self.room = staged
        """Directory or URL of the lake, and the cache that has its arrays."""
        try:
            self.options = options = json.loads((path / LAKE_FILE).read_text(encoding="utf-8"))
            check_shape(options, _SHAPE)
            known = [name.rstrip("?") for name in _SHAPE]
            if wrong := sorted(options.keys() - known):
                raise ValueError(f"{wrong[0]!r} is unknown; allowed: {', '.join(known)}")
            if options.get("time_unit", "s") not in TIME_UNITS or not {*options.get("raw_ids", ())} <= {"item", "user"}:
                raise ValueError(f"time_unit is one of {', '.join(TIME_UNITS)}, and raw_ids lists item, user or both")
            place = options.get("files", ".").removeprefix("file://")
            joined = os.path.normpath(place if remote.url_of(place) else os.path.join(self.given, place))
            self.root = remote.url_of(joined) or os.path.realpath(joined)
            found = [(name, *state) for name, state in files_below(self.root).items() if name.endswith(".parquet")]
            if (live := snapshot(self.root)) is not None:
                found = [each for each in found if each[0] in live]
                if len(found) < len(live):
                    raise ValueError(f"{self.root} is a table with files outside of this directory")
            self.files = sorted(each for each in found if not re.search("/[._]", each[0][len(self.root) :]))
            if not self.files:
                raise ValueError(f"no file in {self.root} ends with .parquet")
            data = open_dataset({name: size for name, size, _ in self.files})
        except (OSError, ValueError) as error:  # pyarrow raises subclasses of these
            file = f"{self.given}/{LAKE_FILE}"
            raise DataError(f"{file}: {error}. docs/data_at_scale.md says what it may hold") from error
        self._fragments, self._directories = list(data.get_fragments()), data.partitioning.schema
        named = {options[key]: role for key, role in _ROLES.items() if key in options}
        self.of_events: dict[str, Role] = named | dict.fromkeys(options.get("event_columns", ()), "event")
        """Column of lists → its role."""
        self.of_users: list[str] = [*dict.fromkeys([options["user"], *options.get("context_columns", ())])]
        """The columns with one value per row, the user first."""
        self.is_raw = "item" in options.get("raw_ids", ())
        not_coded = {"timestamp", "item" if self.is_raw else ""}
        self.coded = [*self.of_users[1:], *(name for name, role in self.of_events.items() if role not in not_coded)]
        """The columns of codes."""
        self.cache = self.room.place(self.given, json.dumps([self.options, self.files]).encode())
        """Directory of the arrays that are made of these columns of these files."""

    def describe(self) -> dict[str, Any]:
        """The description of a store with this content. The first process of a host reads the users of all files."""
        with FileLock(f"{self.cache}.lock"):
            if not self._has_users():
                _log.info("%s: reading the users of %d files", self.given, len(self.files))
                remove(self.cache)
                with written_aside(self.cache) as aside:
                    aside.mkdir()
                    _write_users(self, aside)
        return json.loads((self.cache / META_FILE).read_text(encoding="utf-8")) | {"lake": self}

    def _has_users(self) -> bool:
        """Whether all arrays with a value per user are in the cache. Notes that they are used."""
        if not (self.cache / META_FILE).is_file():
            return False
        files = json.loads((self.cache / META_FILE).read_text(encoding="utf-8"))["files"]
        return all([remote.is_there(self.cache / file, files[file]) for file in files if "/" not in file])

    @contextmanager
    def reading(self, number: int) -> Iterator[None]:
        """Turns errors of a file, and of the disk of the cache, into a DataError."""
        try:
            yield
        except UserError:
            raise
        except (OSError, ValueError) as error:  # pyarrow raises subclasses of these
            text = str(error).partition("\n")[0]
            raise DataError(f"{self.files[number][0]} cannot be read, or its arrays written: {text}") from error

    def scan(self, number: int, columns: Sequence[str]) -> Any:
        """pyarrow.dataset.Scanner of the rows of a file that ``where`` keeps, in their order."""
        import pyarrow
        from pyarrow import parquet

        where, schema = self.options.get("where"), self._fragments[number].physical_schema
        return self._fragments[number].scanner(
            schema=pyarrow.schema([*schema, *(each for each in self._directories if each.name not in schema.names)]),
            columns=columns,
            filter=parquet.filters_to_expression(where) if where else None,
            batch_size=_ROWS_PER_BATCH,
            batch_readahead=4,
        )

    def runs(self, number: int, column: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first row, offsets int64 [rows + 1], values int64 [offsets[-1]]) of a column of lists, batch after batch.
        Times are in seconds."""
        row = 0
        for batch in self.scan(number, [column]).to_batches():
            lists = batch.column(0)
            self.refuse(number, column, "it is null", np.asarray(lists.is_null()), row)
            offsets, values = run_offsets(lists.value_lengths()), lists.flatten()
            self.refuse(number, column, "it holds a null", np.asarray(values.is_null()), row, offsets)
            numbers = values.cast("int64").to_numpy(zero_copy_only=False)
            unit = getattr(values.type, "unit", self.options.get("time_unit", "s"))
            yield row, offsets, numbers // TIME_UNITS[unit] if self.of_events[column] == "timestamp" else numbers
            row += len(lists)

    def refuse(
        self, number: int, column: str, what: str, wrong: np.ndarray, row: int, offsets: np.ndarray | None = None
    ) -> None:
        """Raises a DataError that names the first wrong row, if there is one. ``wrong``: bool per row from ``row`` on
        or, with ``offsets``, per value of these rows."""
        if wrong.any():
            first = int(np.argmax(wrong))
            row += first if offsets is None else int(np.searchsorted(offsets, first, side="right")) - 1
            kept = " of those that 'where' keeps" if "where" in self.options else ""
            raise self.error(number, column, f"row {row}{kept} (the first is row 0): {what}")

    def error(self, number: int, column: str, what: str) -> DataError:
        """An error in a column of a file."""
        return DataError(f"{self.files[number][0]}: column {column!r}, {what}")

    def check_columns(self, number: int) -> None:
        """Checks that a file has all columns, of whole numbers. Users may be texts."""
        from pyarrow import large_string, null, string, types, uint64

        schema = self._fragments[number].physical_schema
        for name in (*self.of_users, *self.of_events):
            if name not in schema.names:
                raise self.error(number, name, f"which is missing; the file has {', '.join(schema.names)}")
            kind = inner = schema.field(name).type
            if name in self.of_events:
                inner = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else null()
            is_right = (types.is_integer(inner) and inner != uint64()) or types.is_boolean(inner)
            is_right |= types.is_timestamp(inner) and self.of_events.get(name) == "timestamp"
            is_right |= name == self.options["user"] and inner in (string(), large_string())
            if not is_right:
                allowed = "lists of whole numbers" if name in self.of_events else "whole numbers"
                text = f"of type {kind}; allowed: {allowed} up to int64. Texts and other numbers need a store: make one"
                raise self.error(number, name, f"{text} of the table of events with preprocess_dataset.py")

    def largest_code(self, number: int, column: str) -> int:
        """The largest value of a column in a file, by its statistics."""
        footer = self._fragments[number].metadata
        paths = [footer.schema.column(place).path.split(".")[0] for place in range(footer.num_columns)]
        groups = [footer.row_group(group).column(paths.index(column)) for group in range(footer.num_row_groups)]
        filled = [
            each for each in groups if each.num_values and not (each.statistics and not each.statistics.num_values)
        ]
        found = [each.statistics for each in filled]
        if not all(each is not None and each.has_min_max for each in found):
            raise self.error(number, column, "has no statistics in the footer of the file; write it with statistics")
        least = min((int(each.min) for each in found), default=0)
        most = max((int(each.max) for each in found), default=-1)
        if least < 0 or most >= _MOST_CODES:
            text = f"has the value {least if least < 0 else most}; allowed: codes from 0 to {_MOST_CODES - 1}"
            raise self.error(number, column, f"{text}, and for users and items all int64 ids with raw_ids")
        return most

    def footer(self, number: int) -> str:
        """SHA-256 of the content of a file's footer: its schema, counts and statistics."""
        return hashlib.sha256(repr(self._fragments[number].metadata.to_dict()).encode()).hexdigest()

    def check_unchanged(self, number: int) -> None:
        """Raises a DataError if a file has changed since the lake was opened."""
        name, *before = self.files[number]
        if files_below(name) != {name: tuple(before)}:
            raise DataError(f"{name} has changed since this run began. Start the run again; new files need new names")


class LakeFiles(StoreFiles):
    """The arrays of a lake. Those of the events of a file are made when they are first read."""

    def __init__(self, path: Path, meta: Mapping[str, Any], most_open: int | None) -> None:
        self._lake: Lake = meta["lake"]
        super().__init__(self._lake.cache, meta, most_open)
        self._features = {feature.file: feature for feature in map(FeatureMeta.of, meta["features"])}

    def check_sums(self, up_to: int | None) -> None:
        """Nothing to check: what stands for the checksums is derived from the footers of the Parquet files."""

    def damaged(self, file: str, what: str) -> DataError:
        """See StoreFiles."""
        return DataError(f"{self.path / file} is damaged: {what}. Remove {self.path}, and it is made again")

    def _files_of(self, shard: int) -> list[str]:
        """Of the columns that are read."""
        return [shard_file(shard, file) for file in [*self._maps] if file in self.sharded]

    def _bring(self, shard: int, name: str) -> None:
        """Makes an array and, at the same time, those of the next shards: who reads a column mostly reads all of it."""
        if self._is_made(shard, name):
            return
        with FileLock(self.path / f"{name}.lock"):
            room, size = self._lake.room, self.described[shard_file(shard, name)]["bytes"]
            at_once = max(1, min(_THREADS, room.max_bytes // size // 4))  # with some larger ones, they still fit
            shards = [shard, *islice(self._following(shard), at_once - 1)]
            missing = [each for each in shards if not self._is_made(each, name)]
            needed = sum(self.described[shard_file(each, name)]["bytes"] for each in missing)
            room.make_room(needed, {*self.path.glob("*.npy")})
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(partial(self._make, self._features[name]), missing))

    def _is_made(self, shard: int, name: str) -> bool:
        return remote.is_there(self.path / shard_file(shard, name), self.described[shard_file(shard, name)])

    def _make(self, feature: FeatureMeta, shard: int) -> None:
        """Writes the values of a column of the events of a file."""
        lake, number, file = self._lake, self._meta["file_of_shard"][shard], shard_file(shard, feature.file)
        lake.check_unchanged(number)
        first, after = self.shard_users[shard : shard + 2]
        expected = np.diff(self[OFFSETS_FILE][first : after + 1])
        known = self[f"{vocabulary_stem(feature.name)}.npy"] if feature.raw else None
        dtype, length = (self.described[file][key] for key in ("dtype", "length"))
        (self.path / file).parent.mkdir(exist_ok=True)
        with lake.reading(number), written_aside(self.path / file) as aside, aside.open("wb") as out:
            header = {"descr": dtype, "fortran_order": False, "shape": (length,)}
            np.lib.format.write_array_header_1_0(out, header)
            for row, offsets, values in lake.runs(number, feature.name):
                is_other = np.diff(offsets) != expected[row : row + len(offsets) - 1]
                what = f"it has not as many values as {lake.options['item']!r}"
                lake.refuse(number, feature.name, what, is_other, row)
                if feature.role == "timestamp":
                    wrong, what = np.diff(values, prepend=values[:1]) < 0, "its times do not ascend"
                    wrong[offsets[:-1]] = False
                else:
                    values = values if known is None else codes_of(values, known)
                    wrong = values.view(np.uint64) >= np.uint64(feature.cardinality or 0)
                    what = f"a value is not in [0, {feature.cardinality}), as the statistics of the file say"
                lake.refuse(number, feature.name, what, wrong, row, offsets)
                out.write(values.astype(dtype).data)


class _Users(NamedTuple):
    """What a file holds beside the values of its events."""

    columns: list[Any]
    """Lake.of_users as pyarrow arrays [rows]: users int64 or large_string, codes int64."""
    lengths: np.ndarray
    """Events of each user, int64 [rows]."""
    largest: list[int]
    """Largest value of each of Lake.coded."""
    items: np.ndarray
    """The distinct items if their ids are raw, int64; else empty."""


def _read_users(lake: Lake, number: int) -> _Users:
    import pyarrow

    with lake.reading(number):
        lake.check_columns(number)
        largest = [lake.largest_code(number, name) for name in lake.coded]
        table, columns = lake.scan(number, lake.of_users).to_table(), []
        for name in lake.of_users:
            values = table[name].combine_chunks()
            lake.refuse(number, name, "it is null", np.asarray(values.is_null()), 0)
            is_text = pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)
            columns.append(values.cast(pyarrow.large_string() if is_text else pyarrow.int64()))
        item, lengths, items = lake.options["item"], [np.empty(0, np.int64)], np.empty(0, np.int64)
        for row, offsets, values in lake.runs(number, item):
            lengths.append(np.diff(offsets))
            lake.refuse(number, item, "it is empty; leave out users without events", lengths[-1] == 0, row)
            items = np.union1d(items, values) if lake.is_raw else items
        return _Users(columns, np.concatenate(lengths), largest, items)


def _write_users(lake: Lake, directory: Path) -> None:
    """Writes the arrays with a value per user, the ids of items and the description to an empty directory."""
    with ThreadPoolExecutor(_THREADS) as pool:
        of_files = list(pool.map(partial(_read_users, lake), range(len(lake.files))))
    numbers = [number for number, each in enumerate(of_files) if len(each.lengths)]
    if not numbers:
        raise DataError(f"{lake.given}: the files have no rows" + " that 'where' keeps" * ("where" in lake.options))
    found = [of_files[number] for number in numbers]
    features, arrays = _features(lake, found)
    arrays |= _ids_of_users(lake, [each.columns[0] for each in found])
    lake.room.make_room(sum(array.nbytes for array in arrays.values()), set())
    for file, array in arrays.items():
        np.save(directory / file, array)
    meta = _description(lake, dict(zip(numbers, found, strict=True)), features, arrays)
    (directory / META_FILE).write_text(json.dumps(meta), encoding="utf-8")


def _features(lake: Lake, found: Sequence[_Users]) -> tuple[list[FeatureMeta], dict[str, np.ndarray]]:
    """The features, and the files of offsets, of the ids of items, and of contextual features."""
    options, item, ends = lake.options, lake.options["item"], np.cumsum([len(each.lengths) for each in found])
    cardinalities = dict(zip(lake.coded, 1 + np.max([each.largest for each in found], axis=0), strict=True))
    items = np.unique(np.concatenate([each.items for each in found])) if lake.is_raw else np.arange(cardinalities[item])
    arrays = {OFFSETS_FILE: run_offsets(np.concatenate([each.lengths for each in found]))}
    arrays[f"{vocabulary_stem(item)}.npy"] = items
    features = []
    for column in options.get("context_columns", ()):
        place = lake.of_users.index(column)
        codes = np.concatenate([each.columns[place] for each in found]) if place else np.arange(ends[-1])
        raw, cardinality = not place and "user" in options.get("raw_ids", ()), cardinalities.get(column, ends[-1])
        name = column if place else USER_FEATURE
        features.append(FeatureMeta(name, "context", DTYPES["context"], int(cardinality), not place, raw))
        arrays[features[-1].file] = codes.astype(DTYPES["context"])
    for column, role in lake.of_events.items():
        cardinality = len(items) if column == item else cardinalities.get(column)
        size, is_item = None if cardinality is None else int(cardinality), column == item
        features.append(FeatureMeta(column, role, DTYPES[role], size, is_item, is_item and lake.is_raw))
    return features, arrays


def _description(
    lake: Lake, found: Mapping[int, _Users], features: Sequence[FeatureMeta], arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The content of the store's meta.json. ``found``: number of a file with users → what it holds."""
    sources = {name[len(lake.root) + 1 :]: lake.footer(number) for number, (name, *_) in enumerate(lake.files)}
    content = [{**lake.options, "files": None}, sources, [size for _, size, _ in lake.files]]

    def described(file: str, dtype: str, length: int) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps([content, file]).encode()).hexdigest()
        size = _HEADER_BYTES + length * np.dtype(dtype).itemsize
        return {"dtype": dtype, "length": length, "bytes": size, "sha256": digest}

    files = {file: described(file, array.dtype.str, len(array)) for file, array in arrays.items()}
    of_events = [feature for feature in features if feature.name in lake.of_events]
    for shard, each in enumerate(found.values()):
        names = {shard_file(shard, feature.file): feature.dtype for feature in of_events}
        files |= {file: described(file, dtype, int(each.lengths.sum())) for file, dtype in names.items()}
    sharded = {feature.file: described(feature.file, feature.dtype, 0)["sha256"] for feature in of_events}
    ends = np.cumsum([len(each.lengths) for each in found.values()]).tolist()
    return {
        "name": lake.cache.name, "command": None, "statistics": {}, "sources": sources, "files": files,
        "num_users": ends[-1], "num_events": int(arrays[OFFSETS_FILE][-1]), "features": [*map(asdict, features)],
        "file_of_shard": [*found], "shards": {"users": [0, *ends], "sha256": sharded},
    }  # fmt: skip


def _ids_of_users(lake: Lake, parts: Sequence[Any]) -> dict[str, np.ndarray]:
    """The vocabulary of the users. Raises DataError for users with two rows, and for ids that options do not allow."""
    import pyarrow
    from pyarrow import compute

    user = lake.options["user"]
    if other := [number for number, part in enumerate(parts) if part.type != parts[0].type]:
        raise lake.error(other[0], user, f"of another type than in {lake.files[0][0]}")
    ids, stem = pyarrow.concat_arrays(parts), vocabulary_stem(USER_FEATURE)
    counts = ids.value_counts()
    if len(counts) < len(ids):
        twice = counts.filter(compute.greater(counts.field("counts"), 1))[0]["values"]
        raise DataError(f"{lake.given}: user {twice} has several rows; a user has one row in all files together")
    if user in lake.options.get("context_columns", ()) and compute.any(compute.greater(ids[:-1], ids[1:])).as_py():
        raise lake.error(0, user, "is in context_columns, and the rows of all files do not ascend by it; sort them")
    if not pyarrow.types.is_integer(ids.type):
        if "user" in lake.options.get("raw_ids", ()):
            raise lake.error(0, user, "is text, and raw_ids are int64; leave out 'user' there")
        _, offsets, utf8 = ids.buffers()
        ends = np.frombuffer(offsets, np.int64)[: len(ids) + 1]
        return dict(zip(strings_files(stem), (ends, np.frombuffer(utf8, np.uint8)[: ends[-1]]), strict=True))
    return {f"{stem}.npy": ids.to_numpy()}

"""Files of people that name users, items, or candidates of users, in the ids of the raw data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from hstu.base.errors import DataError
from hstu.base.ids import codes_of
from hstu.config.problems import did_you_mean
from hstu.data.batches.jagged import ranges, run_starts
from hstu.data.datasets.spec import UNKNOWN
from hstu.data.store.sequence_store import SequenceStore
from hstu.serve.command import note_unknown, read_ids
from hstu.serve.histories import stored_vocabulary
from hstu.serve.loaded import LoadedModel
from hstu.serve.runtime.files import Vocabulary

_READERS = (".csv", ".parquet")


@dataclass(frozen=True)
class Encoded:
    """Codes of ids of a file that the data knows, and those that it does not know."""

    codes: np.ndarray
    """int64 [n], in the order of the file."""
    unknown: list[Any]
    """Distinct, in the order of the file."""


@dataclass(frozen=True)
class Candidates:
    """C candidates of U users, user after user."""

    users: np.ndarray
    """int64 [U], rows of the users in the store, in the order of their first candidates."""
    counts: np.ndarray
    """int64 [U], at least 1."""
    items: np.ndarray
    """int64 [C], codes of the items."""
    values: Mapping[str, np.ndarray]
    """Feature of events → stored values, [C]."""

    def of_users(self, users: np.ndarray) -> Candidates:
        """The candidates of some users, in the order of these; users without any are left out."""
        order = np.argsort(self.users)
        places = codes_of(users, self.users[order])
        chosen = order[places[places >= 0]]
        rows = ranges(run_starts(self.counts)[chosen], self.counts[chosen])
        return Candidates(
            self.users[chosen],
            self.counts[chosen],
            self.items[rows],
            {name: values[rows] for name, values in self.values.items()},
        )


def item_codes(store: SequenceStore) -> Vocabulary:
    """Raw items → codes of the store."""
    return stored_vocabulary(store, store.item_feature)


def read_codes(file: str, column: str, vocabulary: Vocabulary) -> Encoded:
    """Ids of a .csv or .parquet file with a column of that name, or of a file that ``read_ids`` reads.

    Raises DataError if the file cannot be read or lacks the column, or if the data knows none of its ids.
    """
    if Path(file).suffix in _READERS:
        found = _encode(_read_table(file, (column,)).column(column), vocabulary)
    else:
        found = _encode(pa.chunked_array([pa.array(read_ids(file), pa.string())]), vocabulary)
    known = found.codes >= 0
    if not known.any():
        raise DataError(f"{file}: the data knows no {column} of this file: {', '.join(map(repr, found.unknown[:5]))}")
    return replace(found, codes=found.codes[known])


def users_of_file(loaded: LoadedModel, file: str | None) -> np.ndarray:
    """Rows of the users of a file, each once, int64; None: of all users. Notes those that the data does not know."""
    if file is None:
        return np.arange(loaded.store.num_users)
    found = read_codes(file, "user", loaded.users)
    note_unknown(loaded, file, {"user": found.unknown})
    return found.codes[np.sort(np.unique(found.codes, return_index=True)[1])]


def read_candidates(
    file: str, store: SequenceStore, users: Vocabulary, features: Sequence[str]
) -> tuple[Candidates, dict[str, list[Any]]]:
    """Candidates of a .csv or .parquet file with columns user and item, and one for each of ``features``.

    ``features``: features of events that a model reads before it predicts. Rows of unknown users or items are left out;
    the unknown ids are returned by column. Raises DataError if the file cannot be read, lacks a column or an id, or has
    a value of a feature that the data does not know.
    """
    if Path(file).suffix not in _READERS:
        raise DataError(f"{file}: candidates come from a .csv or .parquet file with the columns user and item")
    table = _read_table(file, ("user", "item", *features))
    encoded = {"user": _encode(table.column("user"), users), "item": _encode(table.column("item"), item_codes(store))}
    known = (encoded["user"].codes >= 0) & (encoded["item"].codes >= 0)
    if not known.any():
        raise DataError(f"{file}: the data knows no pair of user and item of this file")
    rows = encoded["user"].codes[known]
    distinct, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    by_file = np.argsort(first)
    place = np.argsort(by_file)[inverse]
    order = np.argsort(place, kind="stable")
    values = {name: _event_values(file, store, name, table.column(name))[known][order] for name in features}
    return (
        Candidates(
            distinct[by_file], np.bincount(place, minlength=len(distinct)), encoded["item"].codes[known][order], values
        ),
        {name: each.unknown for name, each in encoded.items() if each.unknown},
    )


def _read_table(file: str, columns: Iterable[str]) -> pa.Table:
    """Columns of a file, those of CSV as strings. Raises DataError."""
    wanted = list(columns)
    try:
        if file.endswith(".csv"):
            with csv.open_csv(file) as reader:
                names = reader.schema.names
        else:
            names = pq.read_schema(file).names
        for name in wanted:
            if name not in names:
                raise DataError(f"{file} has no column {name!r}; it has {', '.join(names)}{did_you_mean(name, names)}")
        if file.endswith(".csv"):
            as_text = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), include_columns=wanted)
            table = csv.read_csv(file, convert_options=as_text)
        else:
            table = pq.read_table(file, columns=wanted)
    except (OSError, pa.ArrowException) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise DataError(f"{file} cannot be read: {reason}") from error
    for name in wanted:
        if table.column(name).null_count and name in ("user", "item"):
            raise DataError(f"{file}: {table.column(name).null_count} row(s) have no {name}")
    return table


def _encode(column: pa.ChunkedArray, vocabulary: Vocabulary) -> Encoded:
    """Codes of raw ids, -1 for those that are not known; each distinct id is looked up once."""
    ids = pc.dictionary_encode(column.combine_chunks())
    distinct = ids.dictionary.to_pylist()
    codes = vocabulary.places(distinct).numpy()
    unknown = [value for value, code in zip(distinct, codes, strict=True) if code < 0]
    return Encoded(codes[ids.indices.to_numpy(zero_copy_only=False)], unknown)


def _event_values(file: str, store: SequenceStore, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """Stored values of a feature of events: codes, or float32 with NaN where a number is missing."""
    meta = store.feature(name)
    if meta.role == "event_number":
        try:
            numbers = pc.cast(column, pa.float32()).to_numpy(zero_copy_only=False)
        except pa.ArrowException as error:
            raise DataError(f"{file}: column {name!r} must have numbers: {error}") from error
        return np.asarray(numbers, dtype=np.float32)
    vocabulary = stored_vocabulary(store, name)
    found = _encode(pc.fill_null(column.cast(pa.string()), UNKNOWN), vocabulary)
    missing = int(vocabulary.places([UNKNOWN])[0])
    if found.unknown and missing < 0:
        shown = ", ".join(map(repr, found.unknown[:5]))
        raise DataError(f"{file}: column {name!r} has values that the data does not know: {shown}")
    return np.where(found.codes < 0, missing, found.codes).astype(np.int32)

"""Vectors that rows of a table start with, from a Parquet file by raw id: EmbeddingArgs.initial_rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hstu.base.errors import ConfigError
from hstu.config.args import EmbeddingArgs
from hstu.config.problems import Cite, cite
from hstu.data.datasets.spec import USER_FEATURE
from hstu.data.store.sequence_store import SequenceStore

ID, VECTOR = "id", "vector"
"""Columns of the file: raw ids, and lists of numbers of one length."""
_BLOCK_ROWS = 65_536


@dataclass
class InitialRows:
    """The file of one table. It is read in blocks, so that no rank holds a whole table that is sharded."""

    table: EmbeddingArgs
    raw_ids: np.ndarray | None
    """Row of the table → raw id, ascending, int64 or str objects. None: the raw ids are the numbers of the rows."""
    num_ids: int
    dim: int
    """Columns of the table."""
    cite: Cite
    width: int = field(default=0, init=False)
    """Columns of the file."""
    known: int = field(default=0, init=False)
    """Ids of the file that the data has; ``unknown``: that it lacks. Counted by ``blocks``."""
    unknown: int = field(default=0, init=False)
    checksum: int = field(default=0, init=False)
    """Of the ids and vectors that ``blocks`` has read."""

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows of the table, int64 [n], and their vectors, float32 [n, width], without ids that the data lacks.

        Raises ConfigError for a file that cannot be read or does not fit the table.
        """
        self.known = self.unknown = self.checksum = 0
        seen = np.zeros(self.num_ids, dtype=bool)
        for batch in self._batches():
            ids, vectors = batch.column(ID), self._vectors(batch)
            if ids.null_count:
                self._fail(f"the column {ID!r} has nulls; give every row the raw id of the data")
            values = self._values(ids)
            text = values.tobytes() if values.dtype == np.int64 else "\0".join(values).encode()
            self.checksum = zlib.crc32(vectors.tobytes(), zlib.crc32(text, self.checksum))
            rows = self._rows_of(values)
            is_known = rows >= 0
            rows, vectors, values = rows[is_known], vectors[is_known], values[is_known]
            if (again := seen[rows] | pd.Index(rows).duplicated()).any():
                self._fail(f"the id {values[again].tolist()[0]!r} occurs more than once; keep one row per id")
            seen[rows] = True
            self.known, self.unknown = self.known + len(rows), self.unknown + int((~is_known).sum())
            yield rows, vectors
        if not self.width:
            self._fail("the file has no rows; write one per id")

    def check(self) -> None:
        """Read the whole file and keep nothing of it. Raises as ``blocks``."""
        for _ in self.blocks():
            pass

    def __str__(self) -> str:
        text = (
            f"{self.known:,} of {self.num_ids:,} rows start with the vectors of {self.table.initial_rows} "
            f"({self.width} of {self.dim} columns)"
        )
        return text + (f"; ids of the file that the data lacks: {self.unknown:,}" if self.unknown else "")

    def _batches(self) -> Iterator[pa.RecordBatch]:
        try:
            with pq.ParquetFile(self.table.initial_rows) as file:
                for name in (ID, VECTOR):
                    if (names := file.schema_arrow.names).count(name) != 1:
                        self._fail(f"the file must have one column {name!r}; it has {', '.join(map(repr, names))}")
                yield from file.iter_batches(_BLOCK_ROWS, columns=[ID, VECTOR])
        except FileNotFoundError:
            self._fail("there is no such file; correct the path, or make it with scripts/factorize.py")
        except (OSError, pa.ArrowException) as error:
            self._fail(f"the file cannot be read as Parquet: {error}")

    def _vectors(self, batch: pa.RecordBatch) -> np.ndarray:
        """float32 [n, width]"""
        column = batch.column(VECTOR)
        kind = column.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not is_list or not pa.types.is_floating(kind.value_type):
            self._fail(f"the column {VECTOR!r} is of {kind}; it must have lists of float32")
        lengths = np.asarray(pc.list_value_length(column).fill_null(0))
        if not lengths.all():
            self._fail("a vector is missing or empty; give it numbers, or leave the id out")
        self.width = self.width or int(lengths[0])
        if (others := lengths[lengths != self.width]).size:
            self._fail(f"one vector has {self.width} numbers and another one {others[0]}; give all the same number")
        if self.width > self.dim:
            text = (
                f"the vectors have {self.width} numbers and the rows of the table {self.dim}; shorten the vectors, or "
            )
            self._fail(text + "make the rows wider (NetworkArgs.item_embedding_dim or that of the feature's role)")
        flat = column.flatten()
        vectors = np.asarray(flat.cast(pa.float32(), safe=False)).reshape(-1, self.width)
        if flat.null_count or not np.isfinite(vectors).all():
            self._fail(
                "a vector has a number that is missing or not finite in float32; replace it, or leave the id out"
            )
        return vectors

    def _values(self, ids: pa.Array) -> np.ndarray:
        """Raw ids of the file, int64 or str objects as those of the data."""
        are_texts = self.raw_ids is not None and self.raw_ids.dtype == object
        has_texts = pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)
        if are_texts != has_texts or not (has_texts or pa.types.is_integer(ids.type)):
            kind = "strings" if are_texts else "int64"
            self._fail(f"the column {ID!r} is of {ids.type}, and the raw ids of the data are {kind}; write those")
        try:
            return np.asarray(ids.cast(pa.large_string() if are_texts else pa.int64()))
        except pa.ArrowException as error:
            self._fail(f"the column {ID!r} has ids that are no int64: {error}")

    def _rows_of(self, values: np.ndarray) -> np.ndarray:
        """Row of each raw id, int64; -1 where the data lacks it."""
        if self.raw_ids is None:
            return np.where((values >= 0) & (values < self.num_ids), values, -1)
        rows = np.minimum(np.searchsorted(self.raw_ids, values), self.num_ids - 1)
        return np.where(self.raw_ids[rows] == values, rows, -1).astype(np.int64)

    def _fail(self, text: str) -> NoReturn:
        raise ConfigError(self.cite(self.table, "initial_rows", text))


def find_initial_rows(
    store: SequenceStore, tables: Sequence[EmbeddingArgs], dims: Mapping[str, int], cite: Cite = cite
) -> dict[str, InitialRows]:
    """Table → the vectors that its rows start with, for tables that name a file. Reads no file.

    ``dims``: table → columns. Raises ConfigError, worded by ``cite``, for a table of features with different raw ids.
    """
    found = {}
    for table in (table for table in tables if table.initial_rows is not None):
        ids = [_raw_ids(store, name) for name in table.feature_names]
        if any(not _same(ids[0], other) for other in ids[1:]):
            text = (
                f"the features {', '.join(table.feature_names)} of the table have different raw ids, so that a row "
                "stands for several; give each feature a table of its own"
            )
            raise ConfigError(cite(table, "initial_rows", text))
        num_ids = max(store.cardinality(name) for name in table.feature_names)
        found[table.table_name] = InitialRows(table, ids[0], num_ids, dims[table.table_name], cite)
    return found


def _raw_ids(store: SequenceStore, feature: str) -> np.ndarray | None:
    """As InitialRows.raw_ids."""
    has_own = feature == USER_FEATURE or store.feature(feature).has_vocab
    return store.raw_ids(feature) if has_own else None


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)

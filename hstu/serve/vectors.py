"""Vectors of users and items, part by part, and the files that hold them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from hstu.base.files import written_aside
from hstu.base.ids import codes_of
from hstu.data.batches.batch import HSTUBatch
from hstu.parallel.collectives import gather_objects
from hstu.serve.loaded import LoadedModel

PART_USERS = 10_000
"""Users whose vectors are in memory at once."""


def item_vectors(loaded: LoadedModel) -> Iterator[Tensor]:
    """Vectors of all items of the data, in the order of their codes, chunk by chunk: float32 [n, E], of length 1.

    Items that the model does not have, or that have no row in a dynamic table, have zero vectors. Collective; the same
    on every rank. Raises DataError for a ranking model.
    """
    codes = np.arange(loaded.store.cardinality(loaded.source.roles.item), dtype=np.int64)
    corpus = loaded.retrieval_evaluator().corpus(loaded.model_ids(codes))
    with loaded.inference():
        for first, vectors in corpus.chunks():
            yield vectors[: corpus.size - first]


def own_user_vectors(loaded: LoadedModel, users: np.ndarray, at: int | None = None) -> tuple[np.ndarray, Tensor]:
    """Of users (rows of the store), those that this rank computes, and their vectors: int64 [n], float32 [n, E].

    Each rank computes some. ``at`` and errors: see ``LoadedModel.user_vectors``. Collective.
    """
    own = [np.zeros(0, dtype=np.int64)]

    def noted() -> Iterator[HSTUBatch]:
        for batch in loaded.with_data().history_batches(users, divided=True):
            loaded.mesh.heartbeat.mark()
            own.append(batch.user_ids.numpy()[: batch.real_batch_size])
            yield batch

    vectors = loaded.user_vectors(noted(), at)
    return np.concatenate(own), vectors


def user_vectors(loaded: LoadedModel, users: np.ndarray, at: int | None = None) -> Iterator[np.ndarray]:
    """Vectors of users in the given order, part by part: float32 [n, E], of length 1; the same on every rank."""
    for first in range(0, len(users), PART_USERS):
        part = users[first : first + PART_USERS]
        own, vectors = own_user_vectors(loaded, part, at)
        of_ranks = gather_objects((own, vectors.float().cpu().numpy()), loaded.mesh.world_group)
        computed, joined = (np.concatenate(arrays) for arrays in zip(*of_ranks, strict=True))
        yield joined[places_of(computed, part)]


def places_of(users: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Indices in ``users``, which are distinct, of ``wanted`` ones."""
    order = np.argsort(users)
    return order[codes_of(wanted, users[order])]


class VectorSink(Protocol):
    """Where vectors go."""

    def append(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Write vectors float32 [n, E] of raw ids [n], int64 or str objects."""


@contextmanager
def open_parquet(path: Path, name: str, ids: np.ndarray, width: int) -> Iterator[VectorSink]:
    """A Parquet file with the columns ``name`` and vector, a list of float32; complete once it has its name."""
    kind = pa.string() if ids.dtype == object else pa.int64()
    schema = pa.schema([(name, kind), ("vector", pa.list_(pa.float32(), width))])

    class Sink:
        """Writes one row group per part."""

        def append(self, ids: np.ndarray, vectors: np.ndarray) -> None:
            """See VectorSink."""
            lists = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), width)
            writer.write_table(pa.table([pa.array(ids, kind), lists], schema=schema))

    with written_aside(path) as aside, pq.ParquetWriter(aside, schema) as writer:
        yield Sink()


@contextmanager
def open_npy(path: Path, ids: np.ndarray, width: int) -> Iterator[VectorSink]:
    """An array float32 [len(ids), width] in ``path``, and the raw ids of its rows in <stem>.ids.npy."""
    np.save(path.with_name(f"{path.stem}.ids.npy"), ids.astype(str) if ids.dtype == object else ids)

    class Sink:
        """Fills the rows from the first on."""

        filled = 0

        def append(self, ids: np.ndarray, vectors: np.ndarray) -> None:
            """See VectorSink."""
            array[self.filled : self.filled + len(ids)] = vectors
            self.filled += len(ids)

    with written_aside(path) as aside:
        array = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float32, shape=(len(ids), width))
        yield Sink()
        array.flush()

"""The Python interface for notebooks: load a trained model, inspect it, and compute with it.

    from hstu import api

    trained = api.load("runs/quickstart")
    print(api.format_recommendations(trained.recommend(["1", "2"], top=10)))

docs/python_api.md shows each function with its output. Importing this module imports torch and TorchRec.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu.base.errors import DataError, printable
from hstu.checkpoint.dynamic import read_tables
from hstu.checkpoint.tensors import TABLES, open_tensors
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.splits import Split
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.parallel.dynamic.table import merged
from hstu.serve.histories import histories
from hstu.serve.loaded import LoadedModel
from hstu.serve.predict import evaluate_split, item_vectors
from hstu.serve.runtime.requests import History
from hstu.serve.session import Session
from hstu.train.corpus import Corpus, Queries, recommend
from hstu.train.inference import StoredSource

__all__ = [
    "History",
    "Recommendation",
    "Table",
    "TrainedModel",
    "encode_users",
    "format_recommendations",
    "histories",
    "load",
    "open_store",
]


@dataclass(frozen=True)
class Recommendation:
    """The best items of one user, best first, with raw ids."""

    user: Any
    items: list[Any]
    titles: list[str]
    """Titles, or raw ids if the data has no titles."""
    scores: list[float]
    """Cosine similarities of the user vector and the item vectors."""


@dataclass(frozen=True)
class Table:
    """A whole embedding table in host memory."""

    ids: Tensor | None
    """int64 [n], ascending: the id of each row of a dynamic table. None for a static table: row i belongs to code i."""
    rows: Tensor
    """float32 [n, dim]."""


def open_store(path: str | Path) -> SequenceStore:
    """Open preprocessed data such as ``tmp_data/ml-100k``. Raises DataError."""
    return SequenceStore.open(path)


@dataclass
class TrainedModel(LoadedModel):
    """A model with trained weights, its data and its configuration, created by :func:`load`.

    Methods compute without dropout, and with averaged weights if the run kept them. They are collective.
    """

    def tables(self) -> dict[str, Table]:
        """Read all embedding tables from the checkpoint. Returns table name → table."""
        tensors, dynamic = open_tensors(self.checkpoint), read_tables(self.checkpoint)
        tables = {name: merged(parts) for name, parts in dynamic.items()}
        static = (name.removeprefix(TABLES) for name in tensors.sizes if name.startswith(TABLES))
        return {name: Table(None, tensors.read_whole(TABLES + name)) for name in static} | {
            name: Table(content.ids[order], content.rows[order])
            for name, content in tables.items()
            for order in [content.ids.argsort()]
        }

    def batches(self, split: Split = "valid") -> Iterator[HSTUBatch]:
        """Iterate over the evaluation batches of a split ("valid"; "test" for retrieval), on the device."""
        return (batch.to(self.mesh.device) for batch in self.source.eval_batches(split))

    def evaluate(self, split: Split = "valid", metrics: Sequence[str] | None = None) -> dict[str, float]:
        """Compute metrics on a split: the configured metrics, or others of the task, such as ("HR@50",)."""
        return evaluate_split(self, split, metrics).metrics()

    def user_embeddings(self, users: Sequence[Any], at: int | None = None) -> Tensor:
        """Encode users with their whole histories into unit vectors, float32 [len(users), E].

        Args:
            users: raw ids; numbers may be given as strings.
            at: time of the request in whole seconds since 1970. None: the time of each user's newest event.

        Raises:
            DataError: unknown users, users with events after ``at``, or a ranking model, which has no user vectors.
            ConfigError: ``at`` is given to a model that does not read it (``reads_request_time``).
        """
        self.require_retrieval()
        batches = self.with_data().history_batches(encode_users(self.store, users))
        return self.user_vectors(batches, at)

    def item_embeddings(self) -> Tensor:
        """Unit vectors of all items in the order of ``store.raw_ids(store.item_feature)``, float32 [items, E].

        Items without a row in the model's table have zero vectors. Raises DataError for a ranking model.
        """
        return torch.from_numpy(np.concatenate(list(item_vectors(self))))

    def recommend(self, users: Sequence[Any], top: int = 10, at: int | None = None) -> list[Recommendation]:
        """Recommend the ``top`` best items, unseen if ``leaves_out_seen``. ``at`` and errors: `user_embeddings`."""
        self.require_retrieval()
        rows, corpus = encode_users(self.store, users), self.retrieval_evaluator().corpus()
        vectors = self.user_vectors(self.with_data().history_batches(rows), at)
        return self._best(users, vectors, corpus, *self.items_of(rows), top)

    def known_users(self, users: Iterable[Any]) -> tuple[list[Any], list[Any]]:
        """Divide raw user ids into (known, unknown) users of the data, each in the given order."""
        named = list(users)
        places = self.users.places(named).tolist()
        known, unknown = (
            [user for user, place in zip(named, places, strict=True) if (place >= 0) == b] for b in (True, False)
        )
        return known, unknown

    def recommend_for(
        self, given: Sequence[History], top: int = 10, at: int | Sequence[int] | None = None
    ) -> tuple[list[Recommendation], dict[str, list[Any]]]:
        """As :meth:`recommend`, for histories given by hand. Works without the data of the run.

        Returns the recommendations, and feature → unknown values. Unknown items and unknown or missing contextual
        features get a row of zeros. Item features that are not given come from the data, if it exists.
        ``at``: one time for all or one per history; it and errors: see :meth:`user_embeddings`. Also raises DataError
        for a history that is empty or lacks actions, times or features that the model reads.
        """
        if isinstance(at, Sequence) and len(at) != len(given):
            raise DataError(f"at has {len(at)} times for {len(given)} histories; give one for each")
        corpus, item_feature = self.retrieval_evaluator().corpus(), self.source.roles.item
        vectors = self.user_vectors(self.encoder.batches(given), at)
        lengths = np.array([len(history.items) for history in given], dtype=np.int64)
        items = [item for history in given for item in history.items]
        seen = self.vocabularies[item_feature].rows(items).numpy()
        best = self._best([history.user for history in given], vectors, corpus, seen, lengths, top)
        unknown = self.encoder.unknown(given)
        if absent := {items[place] for place in np.flatnonzero(corpus.positions(seen) < 0)}:
            unknown[item_feature] = sorted(absent, key=str)
        return best, unknown

    def histories(self, users: Sequence[Any]) -> Iterator[History]:
        """The histories of users with the features that the model reads. Raises DataError for unknown users."""
        return self.histories_of(encode_users(self.store, users))

    def session(self, cache_bytes: int, **options: Any) -> Session:
        """Create a cache of encoded histories. Arguments and errors: see :class:`hstu.serve.session.Session`."""
        return Session(self, cache_bytes, **options)

    def _best(
        self,
        users: Sequence[Any],
        vectors: Tensor,
        corpus: Corpus,
        seen: np.ndarray,
        seen_lengths: np.ndarray,
        top: int,
    ) -> list[Recommendation]:
        rows = np.arange(len(users))
        if not self.leaves_out_seen:
            seen, seen_lengths = seen[:0], np.zeros_like(seen_lengths)
        with self.inference():
            queries = Queries(vectors, rows, np.full_like(rows, -1), seen, seen_lengths)
            positions, scores = recommend(queries, corpus, top)
        found = positions >= 0
        items, titles = map(iter, self._describe_items(corpus.ids.cpu().numpy()[positions[found]]))
        return [
            Recommendation(user, list(islice(items, count)), list(islice(titles, count)), own[:count].tolist())
            for user, own, count in zip(users, scores, found.sum(axis=1), strict=True)
        ]

    def _describe_items(self, ids: np.ndarray) -> tuple[list[Any], list[str]]:
        items = self.vocabularies[self.source.roles.item].values_at(torch.from_numpy(ids))
        titles = None if isinstance(self.source, StoredSource) else self.store.titles()
        if titles is None:
            return items, [str(item) for item in items]
        codes = self.items.places(items).tolist()
        named = [str(titles[code]) if code >= 0 else "" for code in codes]  # -1: the item is not in this store
        return items, [title or str(item) for title, item in zip(named, items, strict=True)]


load = TrainedModel.load


def format_recommendations(recommendations: Iterable[Recommendation]) -> str:
    """Format recommendations for printing, one block per user. Control characters are escaped."""
    lines = []
    for entry in recommendations:
        lines.append(f"\nuser {printable(str(entry.user), keep='')}")
        for place, (item, title, score) in enumerate(zip(entry.items, entry.titles, entry.scores, strict=True), 1):
            raw_id = f"  [{item}]" if title != str(item) else ""
            lines.append(f"  {place:>3}.  {score:6.3f}  {printable(f'{title}{raw_id}', keep='')}")
    return "\n".join(lines)


def encode_users(store: SequenceStore, users: Sequence[Any]) -> np.ndarray:
    """Look up the store rows of raw user ids, int64 [len(users)]. Raises DataError that names unknown users."""
    if store.raw_ids(USER_FEATURE).dtype == object:
        return store.encode(USER_FEATURE, users)
    try:
        numbers = np.array([int(user) for user in users], dtype=np.int64)
    except ValueError as error:
        raise DataError(f"{store.path}: user ids are whole numbers, got {list(users)!r}") from error
    return store.encode(USER_FEATURE, numbers)

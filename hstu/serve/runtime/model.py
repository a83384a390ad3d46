"""The model of an exported directory: what a service calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .encode import Encoder
from .files import (
    COMPILED,
    PROGRAM,
    TABLES,
    VOCABULARY,
    WEIGHTS,
    Vocabulary,
    read_directory,
    read_tables,
    read_tensors,
    texts_of,
)
from .layout import Sequence_, run
from .requests import Candidates, History, ServingError

ITEM_VECTORS = "item_vectors"
_SCORES_AT_ONCE = 1 << 25
"""Scores of users and items that are computed at once."""


@dataclass(frozen=True)
class Recommendation:
    """The best items of one user, best first."""

    items: list[Any]
    """Ids of the raw data."""
    scores: list[float]
    """Cosines of the vectors of user and item."""
    titles: list[str]
    """Titles of the items; empty where the data has none."""


def load(directory: str | Path, *, compiled: bool = False, like: Model | None = None) -> Model:
    """Load the folder ``serving`` of an export, and compare every file with its checksum.

    Args:
        directory: the folder. It may have been moved, and may change or be removed afterwards.
        compiled: run the program that ``--aot`` has compiled for this kind of machine instead of the graph.
        like: a model that this one may share the program with. Reading a program takes seconds, and exports of one
            configuration have equal ones.

    Raises:
        ServingError: a file is missing, incomplete or damaged, or the folder is of another version.
    """
    return Model(Path(directory), compiled, like)


class Model:
    """An exported model in host memory; :func:`load` creates it. Several threads may call it at once.

    ``facts`` is what serving.json holds: features, tasks and limits of the model. ``encoder`` looks up what it reads.
    ``titles`` are those of the items in the order of ``encoder.items``; empty where the data has none.
    """

    def __init__(self, directory: Path, compiled: bool, like: Model | None) -> None:
        self.facts, checksums = read_directory(directory)
        self._tables = tables = read_tables(directory / TABLES)
        stored = read_tensors(directory / VOCABULARY)
        vocabularies = {name: Vocabulary.read(stored, name, each) for name, each in self.facts["features"].items()}
        self.encoder = Encoder(self.facts, vocabularies, vocabularies[self.facts["item"]], stored)
        self.titles = texts_of(stored, "titles") if "titles.utf8" in stored else []
        self._items: Tensor | None = None
        if self.facts["task"] == "retrieval":
            items, places = self.encoder.items, torch.arange(self.encoder.items.size)
            if ITEM_VECTORS in tables:
                vectors = tables[ITEM_VECTORS].rows(places)
            else:
                vectors = tables[self.facts["features"][self.facts["item"]]["table"]].rows(items.rows_of(places))
            self._items = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=self.facts["l2_norm_eps"])
            self._is_missing = ~self._items.any(dim=1)
        if compiled and COMPILED not in checksums:
            raise ServingError(f"{directory} has no compiled program; export with --aot, or load it without")
        self._weights = dict(sorted(read_tensors(directory / WEIGHTS).items()))
        self._checksum = checksums[COMPILED if compiled else PROGRAM]
        self._program: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
        if like is not None and like._checksum == self._checksum:
            self._program = like._program
        elif compiled:
            self._program = torch._inductor.aoti_load_package(str(directory / COMPILED))
        else:
            self._program = torch.export.load(directory / PROGRAM).module()

    @property
    def reads_request_time(self) -> bool:
        """Whether results depend on ``at``, when they are asked for."""
        return bool(self.facts["reads_request_time"])

    def recommend(
        self, history: History, k: int = 10, at: int | None = None, filter_seen: bool = True
    ) -> Recommendation:
        """:meth:`recommend_batch` for one history."""
        return self.recommend_batch([history], k, at, filter_seen)[0]

    def recommend_batch(
        self, histories: Sequence[History], k: int = 10, at: int | None = None, filter_seen: bool = True
    ) -> list[Recommendation]:
        """The ``k`` best items of each user; fewer where there are not as many.

        Args:
            histories: what each user has done.
            k: number of items.
            at: when they ask, in whole seconds since 1970. None: at the newest event of each.
            filter_seen: leave out the items of a user's history.

        Raises:
            ServingError: a history lacks something that the model reads, is empty or has an event after ``at``; the
                model does not read ``at``; or it is a ranking model.
        """
        seen = [history.items if filter_seen else () for history in histories]
        self._item_vectors("recommend")
        return self.nearest(self.embed_batch(histories, at), [k] * len(histories), seen)

    def nearest(self, queries: Tensor, k: Sequence[int], seen: Sequence[Sequence[Any]]) -> list[Recommendation]:
        """The items whose vectors have the largest cosines with each of ``queries``, float32 [n, E].

        ``k``: the number of items of each. ``seen``: items to leave out of each.
        """
        items, found = self._item_vectors("recommend"), []
        step = max(1, _SCORES_AT_ONCE // max(1, len(items)))
        for first in range(0, len(queries), step):
            scores = queries[first : first + step] @ items.t()
            scores[:, self._is_missing] = -torch.inf
            for own, left_out in zip(scores, seen[first : first + step], strict=True):
                places = self.encoder.items.places(left_out)
                own[places[places >= 0]] = -torch.inf
            own_k = k[first : first + step]
            best, places = scores.topk(min(max(own_k), len(items)), dim=1)
            found += [self._named(*row) for row in zip(best, places, own_k, strict=True)]
        return found

    def _named(self, scores: Tensor, places: Tensor, k: int) -> Recommendation:
        chosen = places[scores > -torch.inf][:k]
        titles = [self.titles[place] for place in chosen.tolist()] if self.titles else []
        return Recommendation(self.encoder.items.values_at(chosen), scores[: len(chosen)].tolist(), titles)

    def embed(self, history: History, at: int | None = None) -> Tensor:
        """:meth:`embed_batch` for one history: float32 [E]."""
        return self.embed_batch([history], at)[0]

    def embed_batch(self, histories: Sequence[History], at: int | None = None) -> Tensor:
        """Vectors of users, float32 [len(histories), E], of length 1. Arguments and errors: :meth:`recommend_batch`."""
        width = self._item_vectors("embed").shape[1]
        encoded = [self.encode(history, at) for history in histories]
        return torch.cat([torch.empty(0, width), *self.run(encoded)])

    def encode(self, history: History, at: int | None = None) -> Sequence_:
        """What :meth:`run` reads of a user to embed. A server encodes requests of several times and runs them together.

        Arguments and errors: :meth:`recommend_batch`.
        """
        self._item_vectors("embed")
        return self.encoder.history(history, at, self.facts["max_items"]), None

    def run(self, encoded: Sequence[Sequence_]) -> list[Tensor]:
        """What the program predicts for each: the vector [1, E] of a user, or logits [candidates, outputs]."""
        return run(lambda inputs: self._program(inputs, self._weights), self.facts, self._tables, encoded)

    def item_vectors(self, items: Sequence[Any]) -> Tensor:
        """Vectors of items, float32 [len(items), E], of length 1; zeros for items that the model does not have."""
        places = self.encoder.items.places(items)
        return self._item_vectors("embed")[places.clamp(min=0)].masked_fill((places < 0)[:, None], 0)

    def score(
        self, history: History, candidates: Candidates | Sequence[Any], at: int | None = None
    ) -> dict[str, list[Any]]:
        """:meth:`score_batch` for one history."""
        return self.score_batch([history], [candidates], at)[0]

    def score_batch(
        self, histories: Sequence[History], candidates: Sequence[Candidates | Sequence[Any]], at: int | None = None
    ) -> list[dict[str, list[Any]]]:
        """For each history: name of a prediction → its value for each candidate, in the order given.

        Ranking has a prediction per task (``facts["tasks"]``). A binary task gives a probability, a class task a list
        of probabilities, others a number. Retrieval has "cosine".
        Arguments and errors: :meth:`recommend_batch`.
        """
        return [self.predictions(outputs) for outputs in self.predict_batch(histories, candidates, at)]

    def predictions(self, outputs: Tensor) -> dict[str, list[Any]]:
        """Name of a prediction → its values, of what the model computes for candidates, float32 [n, outputs]."""
        values, first = {}, 0
        for task in self.facts["tasks"]:
            own = outputs[:, first : first + task["width"]]
            first += task["width"]
            if task["kind"] != "number":
                own = own.softmax(1) if task["kind"] == "class" else own.sigmoid()
            values[task["name"]] = (own if task["kind"] == "class" else own[:, 0]).tolist()
        return values

    def predict_batch(
        self, histories: Sequence[History], candidates: Sequence[Candidates | Sequence[Any]], at: int | None = None
    ) -> list[Tensor]:
        """As :meth:`score_batch`, but what the model computes, float32 [candidates, outputs]: logits of ranking."""
        shown = [each if isinstance(each, Candidates) else Candidates(each) for each in candidates]
        if len(shown) != len(histories):
            raise ServingError(f"{len(shown)} lists of candidates for {len(histories)} histories; give one per history")
        if self.facts["task"] == "retrieval":
            queries = self.embed_batch(histories, at)
            return [
                (self.item_vectors(each.items) @ query)[:, None] for each, query in zip(shown, queries, strict=True)
            ]
        pairs = list(zip(histories, shown, strict=True))
        parts = [self.encoder.sequences(history, each, at) for history, each in pairs]
        found = iter(self.run([part for own in parts for part in own]))
        width = sum(task["width"] for task in self.facts["tasks"])
        return [torch.cat([torch.empty(0, width), *(next(found) for _ in own)]) for own in parts]

    def _item_vectors(self, purpose: str) -> Tensor:
        if self._items is None:
            raise ServingError(f"cannot {purpose}: a ranking model has no vectors of users and items; use score")
        return self._items

"""Predict for many users: best items (retrieval), scores of given candidates (both tasks), and vectors.

Callers pass users in chunks to bound the memory. Ranks divide each chunk. Its result depends only on its users.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hstu.base.errors import ConfigError, DataError
from hstu.base.ids import codes_of
from hstu.config.args import DatasetArgs
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.jagged import ranges, run_indices
from hstu.data.store.reader import GivenRequests
from hstu.data.store.sequence_store import USER_FEATURE
from hstu.parallel.collectives import gather_objects
from hstu.serve.command import Candidates
from hstu.serve.loaded import LoadedModel
from hstu.train.builder import build_evaluator, task_names
from hstu.train.corpus import Queries, pair_scores, recommend
from hstu.train.evaluate import Evaluator, MultiTaskEvaluator, RankingEvaluator
from hstu.train.sources import StoreSource
from hstu.train.task_metrics import sigmoid

PART_USERS = 10_000
"""Users whose vectors are in memory at once."""


def item_vectors(loaded: LoadedModel) -> Iterator[np.ndarray]:
    """Yield unit vectors of all items of the data in the order of their codes, in chunks float32 [n, E].

    Items without a row in the model's table have zero vectors. Raises DataError for a ranking model. Collective.
    """
    codes = np.arange(loaded.store.cardinality(loaded.source.roles.item), dtype=np.int64)
    corpus = loaded.retrieval_evaluator().corpus(loaded.model_ids(codes))
    with loaded.inference():
        for first, vectors in corpus.chunks():
            yield vectors[: corpus.size - first].float().cpu().numpy()


def user_vectors(loaded: LoadedModel, users: np.ndarray, at: int | None = None) -> Iterator[np.ndarray]:
    """Yield unit vectors of users (store rows) in the given order, in chunks float32 [n, E]. Collective."""
    for first in range(0, len(users), PART_USERS):
        part = users[first : first + PART_USERS]
        own, vectors = _own_user_vectors(loaded, part, at)
        computed, joined = _joined(loaded, own, vectors.float().cpu().numpy())
        yield joined[_places_of(computed, part)]


def _own_user_vectors(loaded: LoadedModel, users: np.ndarray, at: int | None = None) -> tuple[np.ndarray, Tensor]:
    """Compute this rank's share of ``users``. Returns (store rows, int64 [n]; vectors, float32 [n, E])."""
    own = [np.zeros(0, dtype=np.int64)]

    def noted() -> Iterator[HSTUBatch]:
        for batch in loaded.with_data().history_batches(users, divided=True):
            loaded.mesh.heartbeat.mark()
            own.append(batch.user_ids.numpy()[: batch.real_batch_size])
            yield batch

    vectors = loaded.user_vectors(noted(), at)
    return np.concatenate(own), vectors


def _places_of(users: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Indices of ``wanted`` users in ``users``, which are distinct."""
    order = np.argsort(users)
    return order[codes_of(wanted, users[order])]


def _joined(loaded: LoadedModel, *own: np.ndarray) -> list[np.ndarray]:
    """All-gather each array and concatenate it in the order of the ranks."""
    of_ranks = gather_objects(own, loaded.mesh.world_group)
    return [np.concatenate(arrays) for arrays in zip(*of_ranks, strict=True)]


class Predictor(ABC):
    """Predicts for users given as store rows. Collective."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.source = loaded.with_data()
        self.store = self.source.store

    @abstractmethod
    def predict(self, users: np.ndarray) -> pa.Table:
        """Predict a table with raw ids, grouped by user in the given order. Every rank returns all rows."""

    def _table(self, users: np.ndarray, items: Sequence[Any], columns: dict[str, np.ndarray]) -> pa.Table:
        """``users``: store rows, int64 [n]; ``items``: raw ids."""
        ids = {
            "user": pa.array(self._raw_users[users], _arrow_type(self._raw_users)),
            "item": pa.array(items, _arrow_type(self._raw_items)),
        }
        return pa.table({**ids, **{name: pa.array(values) for name, values in columns.items()}})

    @cached_property
    def _raw_users(self) -> np.ndarray:
        return self.store.raw_ids(USER_FEATURE)

    @cached_property
    def _raw_items(self) -> np.ndarray:
        return self.store.raw_ids(self.store.item_feature)


def _arrow_type(ids: np.ndarray) -> pa.DataType:
    return pa.string() if ids.dtype == object else pa.int64()


class RetrievalPredictor(Predictor):
    """Predicts the best items of each user, with columns user, item, rank (from 1) and score (cosine similarity).

    Args:
        top: items per user. None: all candidates.
        candidates: rank these items of each user instead of all items. Items without a vector are left out.
        allowed: int64 codes of the only items to recommend. None: all.
        denied: int64 codes of items to exclude.
        keep_seen: also recommend items of the user's history.
        at: time of the request, see ``LoadedModel.user_vectors``.

    Raises DataError for a ranking model, or if no item is left, and ConfigError if the model does not read ``at``.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        top: int | None,
        candidates: Candidates | None = None,
        *,
        allowed: np.ndarray | None = None,
        denied: np.ndarray | None = None,
        keep_seen: bool = False,
        at: int | None = None,
    ) -> None:
        super().__init__(loaded)
        loaded.check_request_time(at)
        self.top, self.candidates, self.keep_seen, self.at = top, candidates, keep_seen, at
        self._evaluator = loaded.retrieval_evaluator()
        self._vocabulary = loaded.vocabularies[self.source.roles.item]
        ids = self._evaluator.corpus().ids.cpu().numpy()
        if allowed is not None:
            ids = np.intersect1d(ids, loaded.model_ids(allowed))
        if denied is not None:
            ids = np.setdiff1d(ids, loaded.model_ids(denied))
        self._ids, self._corpus = ids, self._evaluator.corpus(ids)
        if not self._corpus.size:
            raise DataError("no item is left to recommend: the model has none of the allowed items, or all are denied")

    def predict(self, users: np.ndarray) -> pa.Table:
        """See Predictor."""
        own, vectors = _own_user_vectors(self.loaded, users, self.at)
        with self.loaded.inference():
            if self.candidates is None:
                found = self._best(own, vectors)
            else:
                found = self._best_candidates(own, vectors, self.candidates.of_users(users))
        of_user, items, scores = _joined(self.loaded, *found)
        order = np.argsort(_places_of(users, of_user), kind="stable")
        return self._table(
            of_user[order],
            self._vocabulary.values_at(torch.from_numpy(items[order])),
            {"rank": _ranks(of_user[order]).astype(np.int32), "score": scores[order]},
        )

    def _best(self, users: np.ndarray, vectors: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(user, model id of the item, score) of the best items of the corpus, best first within each user."""
        seen, lengths = self._seen(users)
        queries = Queries(vectors, users, np.full_like(users, -1), seen, lengths)
        assert self.top is not None, "top may be None for candidates only"
        positions, scores = recommend(queries, self._corpus, self.top)
        found = positions >= 0
        return np.repeat(users, found.sum(axis=1)), self._ids[positions[found]], scores[found]

    def _seen(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(model ids of the items to exclude, user after user; their number per user), both int64."""
        if self.keep_seen:
            return np.zeros(0, dtype=np.int64), np.zeros_like(users)
        offsets = np.asarray(self.store.offsets())
        lengths = offsets[users + 1] - offsets[users]
        codes = self.store.sequence(self.store.item_feature)[ranges(offsets[users], lengths)]
        return self.loaded.model_ids(codes), lengths

    def _best_candidates(
        self, users: np.ndarray, vectors: Tensor, candidates: Candidates
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As ``_best``, among the candidates of each user. ``candidates``: for the users of all ranks."""
        corpus = self._evaluator.corpus(np.intersect1d(self.loaded.model_ids(candidates.items), self._ids))
        own = candidates.of_users(users)
        row, items = np.repeat(_places_of(users, own.users), own.counts), self.loaded.model_ids(own.items)
        scores = pair_scores(vectors, row, corpus.positions(items), corpus).cpu().numpy()
        seen, lengths = self._seen(users)
        known = np.unique(np.concatenate([seen, items]))  # products of raw ids may overflow int64
        seen_keys = np.repeat(np.arange(len(users)), lengths) * len(known) + np.searchsorted(known, seen)
        left = (scores > -np.inf) & ~np.isin(row * len(known) + np.searchsorted(known, items), seen_keys)
        order = np.lexsort((items, -scores, row))
        order = order[left[order]]
        if self.top is not None:
            order = order[_ranks(row[order]) <= self.top]
        return users[row[order]], items[order], scores[order]


def _ranks(keys: np.ndarray) -> np.ndarray:
    """Positions of elements in their runs of equal keys, from 1."""
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    return 1 + run_indices(np.diff(starts, append=len(keys)))[1]


class RankingPredictor(Predictor):
    """Scores given candidates with a ranking model. Columns: user, item, and the result of ``score_columns``.

    ``candidates`` have the event features that the model reads. ``at``: see ``LoadedModel.user_vectors``.
    Raises ConfigError if the model does not read ``at``, or if it reads the unknown actions on other candidates.
    """

    def __init__(self, loaded: LoadedModel, candidates: Candidates, at: int | None = None) -> None:
        super().__init__(loaded)
        self.candidates, self.at = candidates, at
        self._evaluator = build_evaluator(loaded.config, self.source, loaded.model, loaded.mesh)
        self._columns = score_columns(self._evaluator, loaded.config, self.source)
        network = loaded.config.network
        if network.target_group_size > 1 and network.interleave_actions:
            raise ConfigError(
                f"the model scores candidates in groups of {network.target_group_size} "
                "(NetworkArgs.target_group_size), in which each reads the actions on those before it, and these are "
                "not known; train with target_group_size = 1"
            )
        loaded.check_request_time(at)

    def predict(self, users: np.ndarray) -> pa.Table:
        """See Predictor."""
        given = self.candidates.of_users(users)
        items = self._raw_items[given.items]
        return self._table(np.repeat(given.users, given.counts), items, self._columns.of(self.logits(given)))

    def logits(self, given: Candidates) -> np.ndarray:
        """Compute the logits of candidates, float32 [C, outputs]. Every rank returns all rows."""
        values: dict[str, Any] = {self.store.item_feature: given.items, **given.values}
        if self.source.roles.action is not None:  # any valid action: the model ignores actions on candidates
            values[self.source.roles.action] = np.full_like(given.items, self._columns.first_action)
        requests = GivenRequests(self.store, given.users, given.counts, values, self.at)
        places, outputs = [np.zeros(0, dtype=np.int64)], [np.zeros((0, self._columns.width), dtype=np.float32)]
        with self.loaded.inference():
            for of_batch, batch in self.source.candidate_batches(requests):
                self.loaded.mesh.heartbeat.mark()
                logits = self._evaluator.forward(batch).logits
                assert logits is not None, "a ranking model has logits"
                places.append(of_batch)
                outputs.append(logits.float().cpu().numpy())
        place, output = _joined(self.loaded, np.concatenate(places), np.concatenate(outputs))
        return output[np.argsort(place)]


@dataclass(frozen=True)
class ScoreColumns:
    """Converts outputs of a ranking model to columns."""

    groups: list[tuple[str, list[str]]]
    """(kind, column names) of consecutive outputs. Kind: "class" for a softmax, "binary" for sigmoids, or other."""
    first_action: int = 0
    """The lowest action that the model has a class for."""
    has_expected: bool = False
    """Whether ``score`` is the expected action."""

    @property
    def width(self) -> int:
        """Number of outputs."""
        return sum(len(names) for _, names in self.groups)

    def of(self, outputs: np.ndarray) -> dict[str, np.ndarray]:
        """Convert outputs, float32 [n, width], to column name → float32 [n]."""
        columns: dict[str, np.ndarray] = {}
        ends = np.cumsum([len(names) for _, names in self.groups])[:-1]
        for (kind, names), own in zip(self.groups, np.split(outputs.astype(np.float64), ends, axis=1), strict=True):
            if kind == "class":
                own = np.exp(own - np.logaddexp.reduce(own, axis=1, keepdims=True))
            elif kind == "binary":
                own = sigmoid(own)
            if self.has_expected:
                columns["score"] = own @ np.arange(self.first_action, self.first_action + len(names))
            columns |= dict(zip(names, own.T, strict=True))
        return {name: values.astype(np.float32) for name, values in columns.items()}


def score_columns(evaluator: Evaluator, config: RunConfig, source: StoreSource) -> ScoreColumns:
    """The columns of a ranking model.

    - One binary task: ``score``, the probability of a positive action. Several: ``score_<name>`` each.
    - Classes: ``p_<action>``, a probability each, and ``score``, the expected action, unless actions are texts.
    - RankingArgs.tasks: ``score_<task>`` (binary: probability, regression: value), ``p_<task>_<label>`` (class).
    """
    if isinstance(evaluator, MultiTaskEvaluator):
        groups = []
        for task in evaluator.tasks:
            name, kind, texts = task.args.task_name, task.args.kind, source.label_facts[task.args.label].texts
            classes = _labels(task.first_class, task.args.output_width, texts)
            groups.append((kind, [f"p_{name}_{each}" for each in classes] if kind == "class" else [f"score_{name}"]))
        return ScoreColumns(groups)
    assert isinstance(evaluator, RankingEvaluator) and isinstance(config.dataset, DatasetArgs)
    if evaluator.num_tasks == 1:
        return ScoreColumns([("binary", ["score"])])
    if evaluator.num_tasks is not None:
        named: Sequence[str] = task_names(config.dataset.dataset_name)
        if len(named) != evaluator.num_tasks:
            named = [f"task{bit}" for bit in range(evaluator.num_tasks)]
        return ScoreColumns([("binary", [f"score_{name}" for name in named])])
    first, count = evaluator.label_offset, config.task_args.prediction_head_arch[-1]  # type: ignore[union-attr]
    action = source.roles.action
    assert action is not None, "a ranking model has actions"
    texts = source.store.raw_ids(action).tolist() if source.store.feature(action).has_vocab else []
    columns = [f"p_{label}" for label in _labels(first, count, texts)]
    return ScoreColumns([("class", columns)], first, has_expected=not texts)


def _labels(first: int, count: int, texts: Sequence[str]) -> list[Any]:
    """Names of ``count`` classes from label ``first`` on. ``texts``: names of the labels 0, 1, …; may be shorter."""
    return [texts[label] if label < len(texts) else label for label in range(first, first + count)]

"""Predictions for many users: the best items of each (retrieval), or scores of given candidates (both tasks).

A caller divides the users into parts, and each part is divided over the ranks, so memory is bounded by one part. The
rows of a part depend on its users alone.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hstu.base.errors import ConfigError, DataError
from hstu.base.files import written_aside
from hstu.config.args import DatasetArgs
from hstu.config.run_config import RunConfig
from hstu.data.batches.given_requests import GivenRequests
from hstu.data.batches.jagged import ranges, run_starts
from hstu.data.store.sequence_store import USER_FEATURE
from hstu.model.tasks import RankingTask
from hstu.parallel.collectives import gather_objects
from hstu.serve.id_files import Candidates
from hstu.serve.loaded import LoadedModel
from hstu.serve.vectors import own_user_vectors, places_of
from hstu.train.builder import build_evaluator, task_names
from hstu.train.corpus import Queries, pair_scores, recommend
from hstu.train.evaluate import Evaluator, MultiTaskEvaluator, RankingEvaluator
from hstu.train.store_source import StoreSource
from hstu.train.task_metrics import sigmoid

SETTINGS_FILE = "_settings.json"
"""Readers of Parquet directories leave out names that begin with an underscore."""
Columns = dict[str, np.ndarray]


class Predictor(ABC):
    """Predicts for users that are given by their rows in the store. Collective."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.source = loaded.with_data()
        self.store = self.source.store

    @abstractmethod
    def predict(self, users: np.ndarray) -> pa.Table:
        """The rows of these users, user after user in the given order, with raw ids; the same on every rank."""

    def _table(self, users: np.ndarray, items: Sequence[Any], columns: dict[str, np.ndarray]) -> pa.Table:
        """``users``: rows of the store, int64 [n]; ``items``: raw ids."""
        raw = self._raw_ids["user"][users]
        types = {name: pa.string() if ids.dtype == object else pa.int64() for name, ids in self._raw_ids.items()}
        ids = {"user": pa.array(raw, types["user"]), "item": pa.array(items, types["item"])}
        return pa.table({**ids, **{name: pa.array(values) for name, values in columns.items()}})

    @cached_property
    def _raw_ids(self) -> dict[str, np.ndarray]:
        return {"user": self.store.raw_ids(USER_FEATURE), "item": self.store.raw_ids(self.store.item_feature)}

    def _joined(self, *own: np.ndarray) -> list[np.ndarray]:
        """The arrays of all ranks, one rank after another."""
        of_ranks = gather_objects(own, self.loaded.mesh.world_group)
        return [np.concatenate(arrays) for arrays in zip(*of_ranks, strict=True)]


@dataclass(frozen=True)
class ItemChoice:
    """Which items a retrieval model may recommend."""

    allowed: np.ndarray | None = None
    """Codes, int64. None: all."""
    denied: np.ndarray | None = None
    """Codes, int64. None: none."""
    keep_seen: bool = False
    """Whether to recommend items that the user has events of."""


class RetrievalPredictor(Predictor):
    """The best items of each user, with columns user, rank (from 1), item and score (a cosine).

    Args:
        top: items per user. None: all candidates.
        choice: the items that may be recommended.
        candidates: those of each user, in place of all items. An item that has no vector is no candidate.
        at: when the users ask, see ``LoadedModel.user_vectors``.

    Raises DataError for a ranking model, or if no item is left, and ConfigError if the model does not read ``at``.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        top: int | None,
        choice: ItemChoice,
        candidates: Candidates | None = None,
        at: int | None = None,
    ) -> None:
        super().__init__(loaded)
        loaded.check_request_time(at)
        self.top, self.choice, self.candidates, self.at = top, choice, candidates, at
        self._evaluator = loaded.retrieval_evaluator()
        self._vocabulary = loaded.vocabularies[self.source.roles.item]
        ids = self._evaluator.corpus().ids.cpu().numpy()
        if choice.allowed is not None:
            ids = np.intersect1d(ids, loaded.model_ids(choice.allowed))
        if choice.denied is not None:
            ids = np.setdiff1d(ids, loaded.model_ids(choice.denied))
        self._ids, self._corpus = ids, self._evaluator.corpus(ids)
        if not self._corpus.size:
            raise DataError("no item is left to recommend: the model has none of the allowed items, or all are denied")

    def predict(self, users: np.ndarray) -> pa.Table:
        """See Predictor."""
        own, vectors = own_user_vectors(self.loaded, users, self.at)
        with self.loaded.inference():
            if self.candidates is None:
                found = self._best(own, vectors)
            else:
                found = self._best_candidates(own, vectors, self.candidates.of_users(users))
        of_user, items, scores = self._joined(*found)
        order = np.argsort(places_of(users, of_user), kind="stable")
        of_user, items, scores = of_user[order], items[order], scores[order]
        ranks = np.arange(len(of_user)) - _first_of_run(places_of(users, of_user)) + 1
        return self._table(
            of_user,
            self._vocabulary.values_at(torch.from_numpy(items)),
            {"rank": ranks.astype(np.int32), "score": scores},
        )

    def _best(self, users: np.ndarray, vectors: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(user, item as the model gets it, score) of the best items of the corpus, best first within each user."""
        seen, lengths = np.zeros(0, dtype=np.int64), np.zeros_like(users)
        if not self.choice.keep_seen:
            seen, lengths = self._seen(users)
        queries = Queries(vectors, users, np.full_like(users, -1), seen, lengths)
        assert self.top is not None, "top may be None for candidates only"
        positions, scores = recommend(queries, self._corpus, self.top)
        found = positions >= 0
        return np.repeat(users, found.sum(axis=1)), self._ids[positions[found]], scores[found]

    def _seen(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the model gets for the items of the users' events, and how many of them each has; int64."""
        offsets = np.asarray(self.store.offsets())
        lengths = offsets[users + 1] - offsets[users]
        codes = self.store.sequence(self.store.item_feature)[ranges(offsets[users], lengths)]
        return self.loaded.model_ids(codes), lengths

    def _best_candidates(
        self, users: np.ndarray, vectors: torch.Tensor, candidates: Candidates
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same among the candidates of each user. ``candidates``: of the users of all ranks."""
        corpus = self._evaluator.corpus(np.intersect1d(self.loaded.model_ids(candidates.items), self._ids))
        own = candidates.of_users(users)
        row, items = np.repeat(places_of(users, own.users), own.counts), self.loaded.model_ids(own.items)
        scores = pair_scores(vectors, row, corpus.positions(items), corpus).cpu().numpy()
        left = scores > -np.inf
        if not self.choice.keep_seen:
            left &= ~self._is_seen(users, row, items)
        order = np.lexsort((items, -scores, row))
        order = order[left[order]]
        rank = np.arange(len(order)) - _first_of_run(row[order])
        order = order[rank < (len(order) if self.top is None else self.top)]
        return users[row[order]], items[order], scores[order]

    def _is_seen(self, users: np.ndarray, row: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether the user has events of an item, bool [n]. ``row``: indices in ``users``."""
        seen, lengths = self._seen(users)
        known = np.unique(np.concatenate([seen, items]))  # raw ids may be too large to be multiplied
        seen_keys = np.repeat(np.arange(len(users)), lengths) * len(known) + np.searchsorted(known, seen)
        return np.isin(row * len(known) + np.searchsorted(known, items), seen_keys)


class RankingPredictor(Predictor):
    """What a ranking model predicts of given candidates, with columns user, item and those of ``score_columns``.

    Args:
        candidates: those of each user, with the features of events that the model reads before it predicts.
        at: when the users ask. None: at the newest event of each.

    Raises ConfigError if the model does not read ``at``, or if it reads the actions of other candidates, which are not
    known.
    """

    def __init__(self, loaded: LoadedModel, candidates: Candidates, at: int | None = None) -> None:
        super().__init__(loaded)
        self.candidates, self.at = candidates, at
        self._evaluator = build_evaluator(loaded.config, self.source, loaded.model, loaded.mesh)
        self._columns = score_columns(self._evaluator, loaded.config, self.source)
        network, roles = loaded.config.network, self.source.roles
        if network.target_group_size > 1 and network.interleave_actions:
            raise ConfigError(
                f"the model scores candidates in groups of {network.target_group_size} "
                "(NetworkArgs.target_group_size), in which each reads the actions on those before it, and these are "
                "not known; train with target_group_size = 1"
            )
        reads_time = network.has_relative_bias or any(name in self.store.time_features for name in roles.side)
        if at is not None and not reads_time:
            raise ConfigError("the model reads no times, so it does not read that of a request; leave the time out")

    def predict(self, users: np.ndarray) -> pa.Table:
        """See Predictor."""
        given = self.candidates.of_users(users)
        values: dict[str, Any] = {self.store.item_feature: given.items, **given.values}
        if self.source.roles.action is not None:  # of some class; the action on a candidate is not read
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
        place, output = self._joined(np.concatenate(places), np.concatenate(outputs))
        output = output[np.argsort(place)]
        items = self._raw_ids["item"][given.items]
        return self._table(np.repeat(given.users, given.counts), items, self._columns.of(output))


def _first_of_run(keys: np.ndarray) -> np.ndarray:
    """For each element of sorted keys, the index of the first equal one."""
    counts = np.unique(keys, return_counts=True)[1]
    return np.repeat(run_starts(counts), counts)


@dataclass(frozen=True)
class ScoreColumns:
    """Turns outputs float32 [n, width] into columns float32 [n]."""

    width: int
    first_action: int
    """An action that the model has a class for."""
    convert: Callable[[np.ndarray], Columns]

    def of(self, outputs: np.ndarray) -> Columns:
        """The columns of these outputs."""
        return {name: values.astype(np.float32) for name, values in self.convert(outputs.astype(np.float64)).items()}


def score_columns(evaluator: Evaluator, config: RunConfig, source: StoreSource) -> ScoreColumns:
    """The columns of a ranking model.

    - One binary task: ``score``, the probability of a positive action; of several, ``score_<name>`` each.
    - Classes: ``p_<action>``, the probability of each, and ``score``, the expected action, unless actions are texts.
    - RankingArgs.tasks: binary ``score_<task>``, a probability; class ``p_<task>_<label>``; regression
      ``score_<task>``, the value.
    """
    if isinstance(evaluator, MultiTaskEvaluator):
        tasks = evaluator.tasks
        widths = [task.args.output_width for task in tasks]

        def of_tasks(outputs: np.ndarray) -> Columns:
            parts = np.split(outputs, np.cumsum(widths)[:-1], axis=1)
            columns: Columns = {}
            for task, own in zip(tasks, parts, strict=True):
                columns |= _task(task, own, source.label_facts[task.args.label].texts)
            return columns

        return ScoreColumns(sum(widths), 0, of_tasks)
    assert isinstance(evaluator, RankingEvaluator)
    if evaluator.num_tasks is not None:
        names = _names_of_bits(evaluator.num_tasks, config)
        return ScoreColumns(len(names), 0, lambda outputs: dict(zip(names, sigmoid(outputs).T, strict=True)))
    first, last = evaluator.label_offset, config.task_args.prediction_head_arch[-1]  # type: ignore[union-attr]
    action = source.roles.action
    assert action is not None, "a ranking model has actions"
    texts = source.store.raw_ids(action).tolist() if source.store.feature(action).has_vocab else []
    return ScoreColumns(last, first, lambda outputs: _classes(outputs, "p_", first, texts, None if texts else "score"))


def _names_of_bits(count: int, config: RunConfig) -> list[str]:
    if count == 1:
        return ["score"]
    assert isinstance(config.dataset, DatasetArgs)
    named = task_names(config.dataset.dataset_name)
    return [f"score_{name}" for name in (named if len(named) == count else [f"task{bit}" for bit in range(count)])]


def _task(task: RankingTask, outputs: np.ndarray, texts: Sequence[str]) -> Columns:
    """``texts``: what the labels 0, 1, … stand for; empty if they are numbers."""
    name, kind = task.args.task_name, task.args.kind
    if kind == "class":
        return _classes(outputs, f"p_{name}_", task.first_class, texts)
    if kind == "binary":
        return {f"score_{name}": sigmoid(outputs[:, 0])}
    return {f"score_{name}": outputs[:, 0]}


def _classes(
    outputs: np.ndarray, prefix: str, first: int, texts: Sequence[str] = (), expected: str | None = None
) -> Columns:
    """The probability of each class, from the label ``first`` on; the expected label if ``expected`` is its column."""
    probabilities = np.exp(outputs - np.logaddexp.reduce(outputs, axis=1, keepdims=True))
    labels = range(first, first + outputs.shape[1])
    names = [texts[label] if label < len(texts) else label for label in labels]
    columns = {f"{prefix}{name}": column for name, column in zip(names, probabilities.T, strict=True)}
    return columns if expected is None else {expected: probabilities @ np.array(labels), **columns}


@dataclass(frozen=True)
class Parts:
    """The files part-00000.parquet, … of a directory. A file is complete once it has its name.

    settings: what the content depends on, by name; JSON. Parts of other settings are not continued.
    """

    directory: Path
    count: int
    settings: Mapping[str, Any]

    def open(self) -> list[int]:
        """Create the directory, or go on in it. Returns the numbers of the parts that are missing.

        Raises DataError if it is complete, was written with other settings, or holds something else.
        """
        file = self.directory / SETTINGS_FILE
        wanted = {"parts": self.count, **self.settings}
        if file.is_file():
            self._check(json.loads(file.read_text(encoding="utf-8")), wanted)
        elif self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise DataError(f"{self.directory} exists and holds no predictions; give another name, or remove it")
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._put(file, lambda aside: aside.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8"))
        missing = [number for number in range(self.count) if not self.path(number).is_file()]
        if not missing:
            raise DataError(f"{self.directory} exists and is complete; give another name, or remove it")
        return missing

    def _check(self, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
        differing = [
            f"{name} was {stored.get(name)!r} and is {wanted.get(name)!r}"
            for name in {**stored, **wanted}
            if stored.get(name) != wanted.get(name)
        ]
        if differing:
            raise DataError(
                f"{self.directory} has parts of another call, which cannot be continued: {'; '.join(differing)}. Give "
                "the same arguments, or another name"
            )

    def path(self, number: int) -> Path:
        """The file of a part."""
        return self.directory / f"part-{number:05d}.parquet"

    def write(self, number: int, table: pa.Table) -> None:
        """Write a part: aside, synced, and then renamed, so that a kill or a crash leaves no half of one."""
        self._put(self.path(number), lambda aside: pq.write_table(table, aside))

    def _put(self, path: Path, write: Any) -> None:
        try:
            with written_aside(path) as aside:
                write(aside)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror or error}") from error

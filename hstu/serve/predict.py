"""Evaluate a split, and predict for many users: best items, scores of given candidates, and vectors.

Callers pass users in chunks to bound the memory. Ranks divide each chunk. Its result depends only on its users.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from hstu.base.errors import ConfigError, DataError
from hstu.base.hashing import hash_ids
from hstu.base.times import as_date
from hstu.config.args import RankingArgs
from hstu.config.args.task import AT_LAST_EVENT, METRICS_OF_KIND, fits_kind
from hstu.config.problems import did_you_mean, in_reading_order
from hstu.config.rules.task import metrics_fit_the_head
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.splits import Period, Split
from hstu.data.store.reader import GivenRequests
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.model.ranking import RankingDense
from hstu.parallel.exchange import Exchange
from hstu.serve.command import Candidates
from hstu.serve.loaded import LoadedModel
from hstu.train.builder import build_evaluator
from hstu.train.corpus import Queries, recommend
from hstu.train.evaluate import NEW, Evaluator, MultiTaskEvaluator, Observations, RetrievalEvaluator
from hstu.train.inference import InferenceSource
from hstu.train.metrics import half_widths

PART_USERS = 10_000
"""Users whose vectors are in memory at once."""
GAPS = {"same second": 0, "within a minute": 60, "within an hour": 3_600, "within a day": 86_400, "later": math.inf}
"""Groups of held-out items → the most seconds since the event before."""


@dataclass(frozen=True)
class Evaluation:
    """Predictions of a model for a split. Methods are collective."""

    evaluator: Evaluator
    observations: Observations
    """The predictions of this rank."""
    held_out: int | None = None
    """Events, or candidates of requests, in the evaluated period. None: a split was evaluated."""
    not_drawn: int = 0
    """Those of them that the period did not draw, see Period.most."""

    def metrics(self) -> dict[str, float]:
        """Compute the metrics of all predictions; nan for metrics that the data leaves undefined."""
        return self.evaluator.metrics_of_all(self.observations)

    def half_widths(self) -> dict[str, float]:
        """Half of a 95 % interval of each metric, over users."""
        found = self.observations
        return half_widths(lambda rows: self.evaluator.metrics_of_all(found.select(rows)), found.users)

    def counts(self) -> tuple[int, int]:
        """(users, predictions) of all ranks."""
        return self._counts("users", np.ones(len(self.observations), dtype=bool))

    def new_counts(self) -> dict[str, tuple[int, int]]:
        """For new users, and for new items: (how many there are, predictions) of all ranks."""
        new = self.evaluator.new_rows(self.observations)
        return {name: self._counts(NEW[name], rows) for name, rows in new.items()}

    def _counts(self, column: str, rows: np.ndarray) -> tuple[int, int]:
        """(different values of a column, rows) of all ranks, among ``rows``, bool [N]."""
        exchange, values = self.evaluator.exchange, np.unique(getattr(self.observations, column)[rows])
        (of_all,) = exchange.to_owners(hash_ids(values, exchange.size), values)
        counts = exchange.total([len(np.unique(of_all)), rows.sum()])
        return int(counts[0]), int(counts[1])

    def by_gap(self, loaded: LoadedModel) -> dict[str, tuple[int, dict[str, float]]]:
        """Group of GAPS → (held-out items, metrics), for groups with any; {} for ranking and for data without times."""
        groups: dict[str, tuple[int, dict[str, float]]] = {}
        if (gaps := _gaps(loaded, self.observations)) is None:
            return groups
        numbers = np.searchsorted([*GAPS.values()], gaps)
        for number, name in enumerate(GAPS):
            here = self.observations.select(numbers == number)
            if count := int(self.evaluator.exchange.total(len(here))):
                groups[name] = count, self.evaluator.metrics_of_all(here)
        return groups

    def rows(self, loaded: LoadedModel) -> pa.Table:
        """On the main rank a row per prediction of all ranks, from which the metrics follow. Others get no rows.

        Columns: user and item; of a period time, in seconds since 1970. Retrieval: rank and score, if the model reads
        the time of the request also rank_last_event and score_last_event, and with times gap, the seconds since the
        event before the item. Ranking: request, the columns of ``loaded.predictions``, and ``label`` (the action) or
        ``label_<task>``.
        """
        to_main = np.zeros(len(self.observations), dtype=np.int64)
        each = Observations(*self.evaluator.exchange.to_owners(to_main, *self.observations.columns()))
        store, columns = loaded.with_data().eval_store, dict[str, np.ndarray]()
        if self.held_out is not None and loaded.dataset.candidates == "requests":
            columns["time"] = store.candidate_times(each.events)[0]
        elif self.held_out is not None:
            columns["time"] = store.sequence(str(store.timestamp_feature))[each.events]
        if isinstance(self.evaluator, RetrievalEvaluator):
            for kind, ranks, scores in zip(("", f"_{AT_LAST_EVENT}"), each.results.T, each.labels.T, strict=False):
                columns |= {f"rank{kind}": ranks, f"score{kind}": scores}
            if (gaps := _gaps(loaded, each)) is not None:
                columns["gap"] = gaps
        else:
            columns |= {"request": each.requests, "label": each.labels}
            if isinstance(self.evaluator, MultiTaskEvaluator):
                values = torch.from_numpy(columns.pop("label").T)
                for task in self.evaluator.tasks:
                    columns[f"label_{task.args.task_name}"] = task.labels(values).numpy()
            columns |= loaded.columns(each.results)
        return _table(loaded, store, each.users, each.items, columns)


def _gaps(loaded: LoadedModel, observations: Observations) -> np.ndarray | None:
    """Seconds since the event before each held-out item, int64 [N]; None for ranking and for data without times."""
    store = loaded.with_data().eval_store
    has_gaps = loaded.config.retrieval is not None and store.timestamp_feature is not None
    return store.gaps(observations.events) if has_gaps else None


def evaluate_split(loaded: LoadedModel, split: Split | Period, metrics: Sequence[str] | None = None) -> Evaluation:
    """Predict a split, or a period to its end. ``metrics``: replace the configured ones. Collective. Raises DataError
    if the data has no events in the period, or no times."""
    config = loaded.config if metrics is None else with_metrics(loaded.config, metrics)
    source, held_out, not_drawn = loaded.with_data(), None, 0
    if isinstance(split, Period):
        config = replace(config, trainer=replace(config.trainer, max_eval_iters=None))
        held_out, not_drawn = _held_out(source, split), source.eval_samples(split).report.get("not_drawn", 0)
    evaluator = build_evaluator(config, source, loaded.model, loaded.mesh)
    if isinstance(split, Period):
        evaluator.newcomers = source.new_to(loaded.checkpoint, split.since)
    with loaded.inference():
        return Evaluation(evaluator, evaluator.observe(source.eval_batches(split)), held_out, not_drawn)


def _held_out(source: InferenceSource, period: Period) -> int:
    report, store = source.eval_samples(period).report, source.eval_store
    if found := report.get("held_out", report.get("candidates", 0)):
        return found
    times = store.sequence(str(store.timestamp_feature))
    first, last = as_date(int(times.min())), as_date(int(times.max()))
    raise DataError(f"{store} has no {period}; it has events from {first} to {last}")


def choose_split(source: InferenceSource, split: str | None) -> Split:
    """Check the name of a split; None: the last split that training evaluates. Raises ConfigError if unknown."""
    allowed = source.final_splits
    if not allowed:
        raise ConfigError('the run evaluates nothing, because its DatasetArgs.split = "none" holds nothing out')
    if found := [known for known in allowed if split in (None, known)]:
        return found[-1]
    raise ConfigError(
        f"the run has no split {split!r}; allowed: {', '.join(allowed)}{did_you_mean(str(split), allowed)}"
    )


def with_metrics(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """Replace the metrics of a configuration. Raises ConfigError for metrics that the task does not have."""
    args = config.task_args
    if not isinstance(args, RankingArgs) or args.tasks is None:
        changed = replace(config, task_args=replace(args, eval_metrics=tuple(names)))
        ConfigError.raise_if(in_reading_order(metrics_fit_the_head(changed, changed.task_args)))
        return changed
    fitting = {task.task_name: [name for name in names if fits_kind(name.upper(), task.kind)] for task in args.tasks}
    if missing := [name for name in names if not any(name in own for own in fitting.values())]:
        allowed = {metric: None for task in args.tasks for metric in METRICS_OF_KIND[task.kind]}
        raise ConfigError(
            f"metrics: no task of the run has {', '.join(missing)}; allowed: {', '.join(allowed)}"
            f"{did_you_mean(missing[0], allowed)}"
        )
    tasks = [replace(task, metrics=tuple(fitting[task.task_name])) for task in args.tasks if fitting[task.task_name]]
    return replace(config, task_args=replace(args, tasks=tasks))


def item_vectors(loaded: LoadedModel) -> Iterator[np.ndarray]:
    """Yield unit vectors of all items in code order, float32 [n, E]; zeros for items without a row. Collective."""
    codes = np.arange(loaded.store.cardinality(loaded.source.roles.item), dtype=np.int64)
    corpus = loaded.retrieval_evaluator().corpus(loaded.model_ids(codes))
    with loaded.inference():
        for first, vectors in corpus.chunks():
            yield vectors[: corpus.size - first].float().cpu().numpy()


def user_vectors(loaded: LoadedModel, users: np.ndarray, at: int | None = None) -> Iterator[np.ndarray]:
    """Yield unit vectors of users (store rows) in the given order, in chunks float32 [n, E]. Collective."""
    gathered = Exchange.of(loaded.mesh).gathered
    for first in range(0, len(users), PART_USERS):
        part = users[first : first + PART_USERS]
        own, vectors = _own_user_vectors(loaded, part, at)
        computed = pd.Index(gathered(own))
        yield gathered(vectors.float().cpu().numpy())[computed.get_indexer(part)]


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


def _table(
    loaded: LoadedModel, store: SequenceStore, users: np.ndarray, items: np.ndarray, columns: dict[str, np.ndarray]
) -> pa.Table:
    """Table of raw ids and ``columns``, with the version of the model in its metadata. ``users``: rows of ``store``,
    int64 [n]. ``items``: model ids, int64 [n]."""
    item_ids = loaded.vocabularies[loaded.source.roles.item].values_at(torch.from_numpy(items))
    raw = {"user": (loaded.users, store.raw_ids(USER_FEATURE)[users].tolist()), "item": (loaded.items, item_ids)}
    ids = {name: pa.array(of, pa.string() if each.kind == "texts" else pa.int64()) for name, (each, of) in raw.items()}
    table = pa.table({**ids, **{name: pa.array(values, from_pandas=True) for name, values in columns.items()}})
    return table.replace_schema_metadata({"model": loaded.version})


class RetrievalPredictor:
    """Predicts the ``top`` best items of each user, with columns user, item, rank (from 1) and score (cosine
    similarity).
    ``allowed``: int64 codes of the only items to recommend; None: all. ``denied``: of items to exclude. ``keep_seen``:
    also recommend items of the user's history; None: as RetrievalArgs.filter_seen says. ``at``: time of the request,
    see ``LoadedModel.user_vectors``.

    Raises DataError for a ranking model, or if no item is left, and ConfigError if the model does not read ``at``.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        top: int,
        *,
        allowed: np.ndarray | None = None,
        denied: np.ndarray | None = None,
        keep_seen: bool | None = None,
        at: int | None = None,
    ) -> None:
        loaded.check_request_time(at)
        self.loaded, self.top, self.at = loaded, top, at
        self.keep_seen = not loaded.leaves_out_seen if keep_seen is None else keep_seen
        self._evaluator = loaded.retrieval_evaluator()
        ids = self._evaluator.corpus().ids.cpu().numpy()
        if allowed is not None:
            ids = ids[np.isin(ids, loaded.model_ids(allowed))]
        if denied is not None:
            ids = ids[~np.isin(ids, loaded.model_ids(denied))]
        self._ids, self._corpus = ids, self._evaluator.corpus(ids)
        if not self._corpus.size:
            raise DataError("no item is left to recommend: the model has none of the allowed items, or all are denied")

    def predict(self, users: np.ndarray) -> pa.Table:
        """Predict for store rows: raw ids, grouped by user in the given order. Collective; every rank gets all rows."""
        exchange = self._evaluator.exchange
        own, vectors = _own_user_vectors(self.loaded, users, self.at)
        seen, lengths = np.zeros(0, dtype=np.int64), np.zeros_like(own)
        if not self.keep_seen:
            seen, lengths = self.loaded.items_of(own)
        queries = Queries(vectors, own, np.full_like(own, -1), seen, lengths)
        with self.loaded.inference():
            positions, scores = recommend(queries, self._corpus, self.top, exchange)
        found = positions >= 0
        best = np.repeat(own, found.sum(axis=1)), self._ids[positions[found]], scores[found]
        of_user, items, of_items = map(exchange.gathered, best)
        order = np.argsort(pd.Index(users).get_indexer(of_user), kind="stable")
        of_user = of_user[order]
        ranks = 1 + pd.Series(of_user).groupby(of_user, sort=False).cumcount().to_numpy(np.int32)
        columns = {"rank": ranks, "score": of_items[order]}
        return _table(self.loaded, self.loaded.store, of_user, items[order], columns)


class RankingPredictor:
    """Scores given candidates with a ranking model. Columns: user, item, and the columns of ``loaded.predictions``.

    ``candidates`` have the event features that the model reads. ``at``: see ``LoadedModel.user_vectors``.
    Raises ConfigError if the model does not read ``at``, or if it reads the unknown actions on other candidates.
    """

    def __init__(self, loaded: LoadedModel, candidates: Candidates, at: int | None = None) -> None:
        self.loaded, self.candidates, self.at = loaded, candidates, at
        network = loaded.config.network
        if network.target_group_size > 1 and network.interleave_actions:
            raise ConfigError(
                f"the model scores candidates in groups of {network.target_group_size} "
                "(NetworkArgs.target_group_size), in which each reads the actions on the candidates before it, and "
                "these are not known; train with target_group_size = 1"
            )
        loaded.check_request_time(at)
        self._evaluator = build_evaluator(loaded.config, loaded.with_data(), loaded.model, loaded.mesh)

    def predict(self, users: np.ndarray) -> pa.Table:
        """See RetrievalPredictor."""
        given = self.candidates.of_users(users)
        users, items = np.repeat(given.users, given.counts), self.loaded.model_ids(given.items)
        return _table(self.loaded, self.loaded.store, users, items, self.loaded.columns(self.logits(given)))

    def logits(self, given: Candidates) -> np.ndarray:
        """Compute the logits of candidates, float32 [C, outputs]. Every rank returns all rows."""
        source = self.loaded.with_data()
        values: dict[str, Any] = {source.roles.item: given.items, **given.values}
        if source.roles.action is not None:  # any valid action: the model ignores actions on candidates
            valid = self.loaded.task.label_offset if isinstance(self.loaded.task, RankingDense) else 0
            values[source.roles.action] = np.full_like(given.items, valid)
        requests = GivenRequests(source.store, given.users, given.counts, values, self.at)
        width = sum(len(each.columns) for each in self.loaded.predictions)
        places, outputs = [np.zeros(0, dtype=np.int64)], [np.zeros((0, width), dtype=np.float32)]
        with self.loaded.inference():
            for of_batch, batch in source.candidate_batches(requests):
                self.loaded.mesh.heartbeat.mark()
                logits = self._evaluator.forward(batch).logits
                assert logits is not None, "a ranking model has logits"
                places.append(of_batch)
                outputs.append(logits.float().cpu().numpy())
        gathered = self._evaluator.exchange.gathered
        place = gathered(np.concatenate(places))
        return gathered(np.concatenate(outputs))[np.argsort(place)]

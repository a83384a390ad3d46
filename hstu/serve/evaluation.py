"""Metrics of a trained model on a split: of all predictions, by segment, with intervals, and beside another model.

Intervals are by the bootstrap over users: how a metric varies if other users had been evaluated. Users are drawn with
replacement, each with all predictions for that user, because those are not independent. Intervals are percentiles of
the resampled metrics (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hstu.base.errors import ConfigError, DataError
from hstu.config.args import RankingArgs
from hstu.config.args.task import METRICS_OF_KIND, fits_kind
from hstu.config.problems import did_you_mean, in_reading_order
from hstu.config.rules.task import metrics_fit_the_head
from hstu.config.run_config import RunConfig
from hstu.data.batches.jagged import ranges, run_indices
from hstu.data.sampling.samples import Split
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh
from hstu.serve.histories import stored_vocabulary
from hstu.serve.loaded import LoadedModel
from hstu.train.builder import build_evaluator
from hstu.train.evaluate import Evaluator, Observations
from hstu.train.inference import InferenceSource
from hstu.train.metrics import undefined_without_warning

HISTORY_BOUNDS = (0, 10, 20, 50, 100, 200, 500, 1000)
"""Where the segments of the length of the history begin."""
_DECILES = 10
Interval = tuple[float, float]
Statistic = Callable[[np.ndarray], dict[str, float]]
"""Places of drawn users, int64 [U], which may repeat → metrics of these users."""


@dataclass(frozen=True)
class Scores:
    """The metrics of some predictions."""

    users: int
    predictions: int
    metrics: dict[str, float]
    """nan where the data does not define one."""
    intervals: dict[str, Interval]
    """Empty without resamples, and for fewer than two users."""


@dataclass(frozen=True)
class Difference:
    """A metric of two models on the same predictions."""

    this: float
    other: float
    difference: float
    """this − other."""
    interval: Interval
    """Of the difference."""
    share_above: float
    """Share of the resamples in which the difference is above 0."""


@dataclass(frozen=True)
class Evaluation:
    """What a model predicts for a split."""

    loaded: LoadedModel
    evaluator: Evaluator
    split: Split
    observations: Observations

    def metrics(self) -> dict[str, float]:
        """The metrics of all predictions."""
        return self.evaluator.metrics(self.observations)

    def scores(self, resampling: Resampling) -> Scores:
        """Metrics and intervals of all predictions. Collective."""
        return self._scores(self.observations, resampling, self.metrics())

    def by_segment(self, by: str, resampling: Resampling) -> Iterator[tuple[str, Scores]]:
        """The same of each segment that has predictions; see ``segmentation``. Collective."""
        found = segmentation(by, self.loaded, self.observations)
        for place, name in enumerate(found.names):
            own = self.observations.select(found.of_row == place)
            if len(own):
                with undefined_without_warning():
                    metrics = self.evaluator.metrics(own)
                yield name, self._scores(own, resampling, metrics)

    def _scores(self, observations: Observations, resampling: Resampling, metrics: dict[str, float]) -> Scores:
        by_user = ByUser(observations)
        intervals = resampling.intervals(lambda drawn: self.evaluator.metrics(by_user.draw(drawn)), len(by_user.users))
        return Scores(len(by_user.users), len(observations), metrics, intervals)


def evaluate_split(loaded: LoadedModel, split: Split, metrics: Sequence[str] | None = None) -> Evaluation:
    """Predict a split. ``metrics``: those to compute instead of the configuration's. Collective."""
    config = loaded.config if metrics is None else with_metrics(loaded.config, metrics)
    source = loaded.with_data()
    evaluator = build_evaluator(config, source, loaded.model, loaded.mesh)
    with loaded.inference():
        return Evaluation(loaded, evaluator, split, evaluator.observe(source.eval_batches(split)))


def choose_split(source: InferenceSource, split: str | None) -> Split:
    """The split of this name, by default the last one that training evaluates. Raises ConfigError for another name."""
    allowed = source.final_splits
    if split is None:
        return allowed[-1]
    for known in allowed:
        if split == known:
            return known
    why = ""
    if split == "test":
        why = ": its held-out users are all valid, because DatasetArgs.valid_fraction is 0"
    elif split == "valid":
        why = ": it holds out no event before the last one of a user, because DatasetArgs.valid_items is 0"
    raise ConfigError(
        f"the run has no split {split!r}{why}; allowed: {', '.join(allowed)}{did_you_mean(str(split), allowed)}"
    )


def with_metrics(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """The configuration with other metrics. Raises ConfigError for those that the task does not have."""
    args = config.task_args
    if not isinstance(args, RankingArgs) or args.tasks is None:
        changed = replace(config, task_args=replace(args, eval_metrics=tuple(names)))
        if problems := list(metrics_fit_the_head(changed)):
            raise ConfigError(in_reading_order(problems))
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


def compare(this: Evaluation, other: Evaluation, resampling: Resampling) -> tuple[int, dict[str, Difference]]:
    """Both models on the users that both have predictions for: the number of these, and each metric.

    A user is drawn for both models at once, so what makes a user easy or hard for both does not widen the interval.

    Raises DataError if there is no such user, or if the models predict other items of one.
    """
    common = _common(this, other)
    ours, theirs = ByUser(common[0]), ByUser(common[1])

    def both(drawn: np.ndarray) -> dict[str, Any]:
        of_each = (this.evaluator.metrics(ours.draw(drawn)), other.evaluator.metrics(theirs.draw(drawn)))
        return {name: value - of_each[1][name] for name, value in of_each[0].items() if name in of_each[1]}

    resampled = resampling.draw(both, len(ours.users))
    values = this.evaluator.metrics(common[0]), other.evaluator.metrics(common[1])
    return len(ours.users), {
        name: Difference(
            value,
            values[1][name],
            value - values[1][name],
            resampling.interval(resampled.get(name, np.zeros(0))),
            float(np.mean(resampled[name] > 0)) if name in resampled else float("nan"),
        )
        for name, value in values[0].items()
        if name in values[1]
    }


def _common(this: Evaluation, other: Evaluation) -> tuple[Observations, Observations]:
    """The predictions of both for the users of both, who have the same numbers in both."""
    (users, items), (their_users, their_items) = _raw(this), _raw(other)
    shared = np.intersect1d(users, their_users)
    if not len(shared):
        raise DataError("the two models have no user in common in this split: nothing can be compared")
    own, theirs = np.isin(users, shared), np.isin(their_users, shared)
    pairs = [
        sorted(zip(u[chosen].tolist(), i[chosen].tolist(), strict=True))
        for u, i, chosen in ((users, items, own), (their_users, their_items, theirs))
    ]
    if pairs[0] != pairs[1]:
        raise DataError(
            f"the two models predict other items of the same {len(shared)} users: their runs divide the data, or cut "
            "histories, in other ways (the options of DatasetArgs differ); compare runs with the same ones"
        )
    return tuple(  # type: ignore[return-value]
        replace(evaluation.observations.select(chosen), users=np.searchsorted(shared, raw[chosen]))
        for evaluation, chosen, raw in ((this, own, users), (other, theirs, their_users))
    )


def _raw(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Raw ids of the user and of the item of each prediction."""
    source, observations = evaluation.loaded.with_data(), evaluation.observations
    items = evaluation.loaded.vocabularies[source.roles.item].values_at(torch.from_numpy(observations.items))
    return source.eval_store.raw_ids(USER_FEATURE)[observations.users], np.array(items)


@dataclass(frozen=True)
class Segmentation:
    """N predictions, each in one segment."""

    names: list[str]
    """In the order in which they are shown."""
    of_row: np.ndarray
    """int64 [N]: index into ``names``."""


def segmentation(by: str, loaded: LoadedModel, observations: Observations) -> Segmentation:
    """Divide predictions by a property of their user or item.

    history: events before the item that the model has read, at most max_sequence_length. popularity: ten segments of
    equally many items, by the events that an item has in the training samples; items without any are a segment of
    their own. cold: whether the item is in any training sample. Else a contextual feature of the data: its value.

    Raises ConfigError for another name, DataError if the data that the model was trained on is needed and not there.
    """
    source = loaded.with_data()
    if by == "history":
        return _of_history(observations.history)
    if by in ("popularity", "cold"):
        counts = np.append(_training_counts(loaded, source), 0)  # for items of eval_dataset_path alone
        found = _deciles(counts) if by == "popularity" else _cold(counts)
        codes = np.minimum(source.item_codes(observations.items), len(counts) - 2)
        is_known = loaded.model_ids(codes) == observations.items
        return Segmentation(found.names, found.of_row[np.where(is_known, codes, len(counts) - 1)])
    features = source.eval_store.contextual_features
    if by not in features:
        allowed = ("history", "popularity", "cold", *features)
        raise ConfigError(
            f"segments: {by!r} is no segment of {source.eval_store.path}; allowed: {', '.join(allowed)}"
            f"{did_you_mean(by, allowed)}"
        )
    return _of_feature(source.eval_store, by, observations.users)


def _of_history(lengths: np.ndarray) -> Segmentation:
    ends = [f"{end - 1}" for end in HISTORY_BOUNDS[1:]]
    names = [f"{first}-{last}" for first, last in zip(HISTORY_BOUNDS, ends, strict=False)]
    return Segmentation([*names, f"{HISTORY_BOUNDS[-1]}+"], np.searchsorted(HISTORY_BOUNDS, lengths, side="right") - 1)


def _of_feature(store: SequenceStore, name: str, users: np.ndarray) -> Segmentation:
    raw = store.raw_ids(name) if store.feature(name).has_vocab else np.arange(store.cardinality(name))
    return Segmentation([str(value) for value in raw], np.asarray(store.context(name)[users], dtype=np.int64))


def _deciles(counts: np.ndarray) -> Segmentation:
    """Of items, by their numbers of training events."""
    trained = np.flatnonzero(counts)
    order = trained[np.argsort(counts[trained], kind="stable")]
    of_item = np.zeros(len(counts), dtype=np.int64)
    of_item[order] = 1 + np.arange(len(order)) * _DECILES // max(1, len(order))
    names = ["no events"]
    for decile in range(1, _DECILES + 1):
        own = counts[of_item == decile]
        names.append(f"{decile}: {own.min():,}-{own.max():,} events" if len(own) else f"{decile}: no items")
    return Segmentation(names, of_item)


def _cold(counts: np.ndarray) -> Segmentation:
    return Segmentation(["trained", "cold"], (counts == 0).astype(np.int64))


def _training_counts(loaded: LoadedModel, source: InferenceSource) -> np.ndarray:
    """int64 [items] by the codes of ``source``: the events of the samples that the model was trained on."""
    if loaded.trained_on is None:
        return source.item_counts.astype(np.int64)
    try:
        trained = InferenceSource(loaded.config, loaded.trained_on, loaded.mesh)
    except DataError as error:
        raise DataError(
            f"the popularity of items is that in the data which the model was trained on. {error}"
        ) from error
    store, item = trained.store, trained.roles.item
    counts = np.append(trained.item_counts, 0).astype(np.int64)  # an unknown item has no events
    return counts[stored_vocabulary(store, item).places(source.store.raw_ids(source.roles.item).tolist()).numpy()]


@dataclass(frozen=True)
class Resampling:
    """How often users are drawn, and by which ranks. The draws depend on the seed alone."""

    mesh: Mesh
    resamples: int = 200
    """0: no intervals."""
    confidence: float = 0.95
    seed: int = 0

    def draw(self, statistic: Statistic, num_users: int) -> dict[str, np.ndarray]:
        """The statistic of each resample, float64 [resamples]; nan where it is undefined. Collective.

        Each rank computes some of the resamples. Empty without resamples, and for fewer than two users, of whom nothing
        can be learnt about others.
        """
        if not self.resamples or num_users < 2:
            return {}
        own = []
        with undefined_without_warning():
            for number in range(self.mesh.rank, self.resamples, self.mesh.world_size):
                self.mesh.heartbeat.beat()
                drawn = np.random.default_rng([self.seed, number]).integers(0, num_users, num_users)
                own.append(statistic(drawn))
        of_ranks = gather_objects(own, self.mesh.world_group)
        found = [of_ranks[number % len(of_ranks)][number // len(of_ranks)] for number in range(self.resamples)]
        return {name: np.array([each[name] for each in found]) for name in found[0]}

    def intervals(self, statistic: Statistic, num_users: int) -> dict[str, Interval]:
        """The confidence interval of each metric; nan if no resample defines it. Collective."""
        return {name: self.interval(values) for name, values in self.draw(statistic, num_users).items()}

    def interval(self, values: np.ndarray) -> Interval:
        """The middle ``confidence`` of resampled values that are not nan."""
        defined = values[~np.isnan(values)]
        if not len(defined):
            return float("nan"), float("nan")
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(defined, [tail, 1 - tail])
        return float(low), float(high)


class ByUser:
    """Observations that are drawn user by user."""

    def __init__(self, observations: Observations) -> None:
        self.users, counts = np.unique(observations.users, return_counts=True)
        """int64 [U], ascending."""
        self._sorted = observations.select(np.argsort(observations.users, kind="stable"))
        self._starts, self._counts = np.cumsum(counts) - counts, counts
        self._next_request = int(observations.requests.max(initial=-1)) + 1

    def draw(self, drawn: np.ndarray) -> Observations:
        """The observations of drawn users, given by their places in ``users``; one who is drawn twice is two users."""
        counts = self._counts[drawn]
        found = self._sorted.select(ranges(self._starts[drawn], counts))
        draw, _ = run_indices(counts)
        # GAUC weights users by their predictions, so two copies under one number count as two users. Requests must be
        # told apart: the candidates of two copies would be ordered together.
        return replace(found, requests=found.requests + draw * self._next_request)

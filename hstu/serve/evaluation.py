"""Metrics of a trained model on a split: of all predictions, by segment, with intervals, and beside another model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from hstu.data.sampling.samples import Split
from hstu.data.store.sequence_store import USER_FEATURE
from hstu.serve.bootstrap import ByUser, Interval, Resampling
from hstu.serve.loaded import LoadedModel
from hstu.serve.segments import segmentation
from hstu.train.builder import build_evaluator
from hstu.train.evaluate import Evaluator
from hstu.train.inference import InferenceSource
from hstu.train.metrics import undefined_without_warning
from hstu.train.observations import Observations


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

"""Exact metrics of ranking and retrieval, computed in float64 from all predictions of the evaluation set.

Ties get midranks: in an AUC two equal scores count one half, and in retrieval a target ranks in the middle of the items
with the same score. A metric that the data does not define (one class only, nothing evaluated) is nan, and a warning
gives the reason.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan

import numpy as np

from hstu.config.args.task import METRICS_PER_TASK

logger = logging.getLogger(__name__)

Gather = Callable[[np.ndarray], np.ndarray]
"""Concatenates the arrays of all data-parallel ranks along the first axis, on every rank. Collective."""


def only_rank(array: np.ndarray) -> np.ndarray:
    """The gather for a single process."""
    return array


@contextmanager
def undefined_without_warning() -> Iterator[None]:
    """Inside, metrics that the data does not define are nan without a warning: for small selections of the data."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def auc_by_group(scores: np.ndarray, positive: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve within each group, float64 [number of distinct groups], in ascending order of groups.

    scores [N], positive bool [N], groups integer [N] (None: one group). nan for a group with one class only.
    """
    if not len(scores):
        return np.zeros(0)
    if groups is None:
        groups, order = np.zeros(len(scores), dtype=np.int64), np.argsort(scores)
    else:
        order = np.lexsort((scores, groups))
    scores, positive, groups = scores[order], positive[order], groups[order]
    group_starts, tie_starts = run_starts(groups), run_starts(groups, scores)
    tie_lengths = np.diff(tie_starts, append=len(scores))
    midranks = np.repeat(tie_starts + (tie_lengths + 1) / 2, tie_lengths)
    num_positive = np.add.reduceat(positive, group_starts, dtype=np.float64)
    num_negative = np.diff(group_starts, append=len(scores)) - num_positive
    # Mann–Whitney U: the ranks within the group minus the ranks of the positives among themselves.
    rank_sums = np.add.reduceat(midranks * positive, group_starts) - num_positive * group_starts
    with np.errstate(invalid="ignore"):
        return (rank_sums - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def run_starts(*keys: np.ndarray) -> np.ndarray:
    """Indices at which a new combination of keys begins, in sorted arrays of at least one element."""
    changes = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return np.concatenate([[0], np.flatnonzero(changes) + 1])


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve; nan unless both classes occur."""
    return float(auc_by_group(scores, positive)[0]) if len(scores) else nan


def grouped_auc(scores: np.ndarray, positive: np.ndarray, users: np.ndarray) -> float:
    """GAUC: mean of the AUCs of users with both classes, weighted by their impressions."""
    areas = auc_by_group(scores, positive, users)
    impressions = np.unique(users, return_counts=True)[1]
    defined = ~np.isnan(areas)
    return float(np.average(areas[defined], weights=impressions[defined])) if defined.any() else nan


class CollectedMetrics(ABC):
    """Metrics that are computed over all predictions at once, after they have been collected batch by batch.

    ``subject``: what the metrics are about, for warnings (" of task 'click'").
    """

    def __init__(self, names: Sequence[str], subject: str = "") -> None:
        self.names = tuple(names)
        self.subject = subject
        self._chunks: list[tuple[np.ndarray, ...]] = []

    def collect(self, predictions: np.ndarray, *others: np.ndarray) -> None:
        """Add M predictions, [M] or [M, width], and arrays [M] that belong to them."""
        self._chunks.append((predictions.astype(np.float32), *others))

    def compute(self) -> dict[str, float]:
        """All metrics over the predictions."""
        if not any(len(chunk[0]) for chunk in self._chunks):
            return self._all_undefined("the evaluation set has no labelled items")
        predictions, *others = (np.concatenate(parts) for parts in zip(*self._chunks, strict=True))
        if not np.isfinite(predictions).all():
            return self._all_undefined("the model predicts values that are not finite")
        return self._compute(predictions.astype(np.float64), *others)

    @abstractmethod
    def _compute(self, predictions: np.ndarray, *others: np.ndarray) -> dict[str, float]:
        """The metrics of at least one finite prediction, float64, and what was collected with it."""

    def _all_undefined(self, reason: str) -> dict[str, float]:
        logger.warning("metrics%s are undefined (nan): %s", self.subject, reason)
        return dict.fromkeys(self.names, nan)

    def mean_of_defined(
        self, name: str, values: np.ndarray, reason: str = "the labels of the evaluation set are all of one class"
    ) -> float:
        """Mean of the values that are not nan; without any, nan and a warning with the ``reason``."""
        defined = values[~np.isnan(values)]
        if not len(defined):
            logger.warning("%s%s is undefined (nan): %s", name, self.subject, reason)
            return nan
        return float(defined.mean())


class RankingMetrics(CollectedMetrics):
    """Collects predictions and computes AUC, AUC>=K, GAUC, LOGLOSS, NE and ACC over all of them.

    There are two kinds of labels, as in the ranking loss (last = width of the logits):

    tasks (``num_tasks`` = last): bit t of an action is the label of task t. AUC and GAUC are also given per task,
    as ``AUC/task0`` …; every metric is the mean over the tasks.

    classes (``num_tasks`` = None): class = action − ``label_offset``. AUC and GAUC are one-vs-rest, the mean over
    the classes that have both positives and negatives. ``AUC>=K`` is the AUC of P(action >= K), for star ratings.

    LOGLOSS is the mean cross entropy in nats. NE is LOGLOSS divided by the LOGLOSS of a model that always predicts the
    base rate (He et al., ADKDD 2014). ACC is the share of correct predictions (tasks: P > 1/2). GAUC: Zhou et al.,
    KDD 2018.
    """

    def __init__(self, names: Sequence[str], *, num_tasks: int | None, label_offset: int = 0) -> None:
        super().__init__(names)
        self.num_tasks = num_tasks
        self.label_offset = label_offset

    def update(self, logits: np.ndarray, actions: np.ndarray, users: np.ndarray) -> None:
        """Add M predictions: logits float [M, last], actions int [M], users int [M] (any id per user)."""
        self.collect(logits, actions.astype(np.int64), users.astype(np.int64))

    def _compute(self, predictions: np.ndarray, *others: np.ndarray) -> dict[str, float]:
        actions, users = others
        if self.num_tasks is None:
            classified = classes(predictions, actions - self.label_offset)
        else:
            classified = binary(predictions, (actions[:, None] >> np.arange(predictions.shape[1]) & 1).astype(bool))
        results: dict[str, float] = {}
        for name in self.names:
            results |= self._compute_one(name, classified, actions, users)
        return results

    def _compute_one(
        self, name: str, classified: Classified, actions: np.ndarray, users: np.ndarray
    ) -> dict[str, float]:
        if name.startswith("AUC>="):
            values = self._threshold_auc(int(name.removeprefix("AUC>=")), classified, actions)
        elif name in CLASSIFICATION_METRICS:
            values = CLASSIFICATION_METRICS[name](classified, users)
        else:
            raise ValueError(f"{name!r} is not a ranking metric; allowed: AUC, GAUC, ACC, LOGLOSS, NE, AUC>=K")
        result = {name: self.mean_of_defined(name, values)}
        if name in METRICS_PER_TASK and self.num_tasks is not None and self.num_tasks > 1:
            result |= {f"{name}/task{task}": float(value) for task, value in enumerate(values)}
        return result

    def _threshold_auc(self, threshold: int, classified: Classified, actions: np.ndarray) -> np.ndarray:
        if self.num_tasks is not None:
            raise ValueError(f"AUC>={threshold} needs one task of several classes, not {self.num_tasks} binary tasks")
        first = max(threshold - self.label_offset, 0)
        return auc_by_group(classified.scores[:, first:].sum(axis=1), actions >= threshold)


@dataclass(frozen=True)
class Classified:
    """Predictions and labels as columns: one per binary task, or one per class of a single task."""

    scores: np.ndarray
    """float64 [M, columns]: logits of binary tasks or probabilities of classes."""
    positive: np.ndarray
    """bool [M, columns]"""
    log_losses: np.ndarray
    """float64 [tasks], nats: mean cross entropy of each task."""
    base_entropies: np.ndarray
    """float64 [tasks], nats: the same for a model that always predicts the base rates."""
    accuracy: float

    def columns(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(scores, positive) of each column."""
        return zip(self.scores.T, self.positive.T, strict=True)

    def normalized_entropies(self) -> np.ndarray:
        """float64 [tasks]; nan for a task whose labels are all equal."""
        defined = self.base_entropies > 0
        return np.divide(self.log_losses, self.base_entropies, where=defined, out=np.full(len(defined), nan))


CLASSIFICATION_METRICS: dict[str, Callable[[Classified, np.ndarray], np.ndarray]] = {
    "AUC": lambda classified, users: np.array([auc(*column) for column in classified.columns()]),
    "GAUC": lambda classified, users: np.array([grouped_auc(*column, users) for column in classified.columns()]),
    "ACC": lambda classified, users: np.array([classified.accuracy]),
    "LOGLOSS": lambda classified, users: classified.log_losses,
    "NE": lambda classified, users: classified.normalized_entropies(),
}
"""(predictions, users int [M]) → values, the mean of which is the metric; nan where it is undefined."""


def binary(logits: np.ndarray, positive: np.ndarray) -> Classified:
    """Tasks with two classes: logits float64 and positive bool, both [M, tasks]."""
    rates = positive.mean(axis=0)
    return Classified(
        scores=logits,
        positive=positive,
        log_losses=np.logaddexp(0, np.where(positive, -logits, logits)).mean(axis=0),
        base_entropies=_entropy(rates) + _entropy(1 - rates),
        accuracy=float(((logits > 0) == positive).mean()),
    )


def classes(logits: np.ndarray, labels: np.ndarray) -> Classified:
    """One task with several classes: logits float64 [M, number of classes], labels int [M]."""
    num_classes = logits.shape[1]
    check_classes(labels, num_classes)
    log_probabilities = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    positive = labels[:, None] == np.arange(num_classes)
    return Classified(
        scores=np.exp(log_probabilities),
        positive=positive,
        log_losses=-log_probabilities[positive].mean(keepdims=True),
        base_entropies=_entropy(positive.mean(axis=0)).sum(keepdims=True),
        accuracy=float((logits.argmax(axis=1) == labels).mean()),
    )


def check_classes(labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError unless all labels are in [0, num_classes)."""
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels are classes {labels.min()} … {labels.max()}, but there are logits for {num_classes}")


def _entropy(rates: np.ndarray) -> np.ndarray:
    """−p log p of each rate; 0 at 0."""
    return -rates * np.log(np.where(rates > 0, rates, 1))


def retrieval_metrics(names: Sequence[str], ranks: np.ndarray) -> dict[str, float]:
    """Means over queries of HR@K, NDCG@K, MRR@K and MRR, from the ranks of the targets (1 is best, ties: midranks).

    HR@K: rank <= K. NDCG@K: 1 / log2(rank + 1) and MRR@K: 1 / rank, both 0 beyond K. MRR: no K.
    Without any query: nan and a warning.
    """
    if not len(ranks):
        logger.warning("metrics are undefined (nan): the evaluation set has no queries")
        return dict.fromkeys(names, nan)
    ordered = np.sort(ranks.astype(np.float64))  # so that sums do not depend on the assignment of queries to ranks
    return {name: float(_gains(name, ordered).mean()) for name in names}


def _gains(name: str, ranks: np.ndarray) -> np.ndarray:
    kind, _, cutoff = name.partition("@")
    hits = ranks <= (int(cutoff) if cutoff else np.inf)
    if kind == "HR":
        return hits
    if kind == "NDCG":
        return hits / np.log2(ranks + 1)
    if kind == "MRR":
        return hits / ranks
    raise ValueError(f"{name!r} is not a retrieval metric; allowed: HR@K, NDCG@K, MRR@K, MRR")

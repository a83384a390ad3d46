"""Exact metrics of ranking and retrieval, computed in float64 from all predictions of the evaluation set.

Ties get midranks: in an AUC two equal scores count one half, and in retrieval a target ranks in the middle of the items
with the same score. A metric that the data does not define (one class only, nothing evaluated) is nan, and a warning
gives the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

logger = logging.getLogger(__name__)

Gather = Callable[[np.ndarray], np.ndarray]
"""Concatenates the arrays of all data-parallel ranks along the first axis, on every rank. Collective."""


def only_rank(array: np.ndarray) -> np.ndarray:
    """The gather for a single process."""
    return array


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
    group_starts, tie_starts = _run_starts(groups), _run_starts(groups, scores)
    tie_lengths = np.diff(tie_starts, append=len(scores))
    midranks = np.repeat(tie_starts + (tie_lengths + 1) / 2, tie_lengths)
    num_positive = np.add.reduceat(positive, group_starts, dtype=np.float64)
    num_negative = np.diff(group_starts, append=len(scores)) - num_positive
    # Mann–Whitney U: the ranks within the group minus the ranks of the positives among themselves.
    rank_sums = np.add.reduceat(midranks * positive, group_starts) - num_positive * group_starts
    with np.errstate(invalid="ignore"):
        return (rank_sums - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def _run_starts(*keys: np.ndarray) -> np.ndarray:
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


class RankingMetrics:
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
        self.names = tuple(names)
        self.num_tasks = num_tasks
        self.label_offset = label_offset
        self._chunks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def update(self, logits: np.ndarray, actions: np.ndarray, users: np.ndarray) -> None:
        """Add M predictions: logits float [M, last], actions int [M], users int [M] (any id per user)."""
        self._chunks.append((logits.astype(np.float32), actions.astype(np.int64), users.astype(np.int64)))

    def compute(self, gather: Gather = only_rank) -> dict[str, float]:
        """All metrics over the predictions of all ranks, the same on every rank. Collective."""
        if not self._chunks:  # then no rank has any: all get equally many batches
            return self._undefined("the evaluation set has no batches")
        logits, actions, users = (gather(np.concatenate(parts)) for parts in zip(*self._chunks, strict=True))
        if not len(actions):
            return self._undefined("the evaluation set has no labelled items")
        if not np.isfinite(logits).all():
            return self._undefined("the model predicts values that are not finite")
        logits = logits.astype(np.float64)
        if self.num_tasks is None:
            labelled = _classes(logits, actions - self.label_offset)
        else:
            labelled = _tasks(logits, actions)
        results: dict[str, float] = {}
        for name in self.names:
            results |= self._compute_one(name, labelled, actions, users)
        return results

    def _undefined(self, reason: str) -> dict[str, float]:
        logger.warning("metrics are undefined (nan): %s", reason)
        return dict.fromkeys(self.names, nan)

    def _compute_one(self, name: str, labelled: _Labelled, actions: np.ndarray, users: np.ndarray) -> dict[str, float]:
        if name == "AUC":
            areas = [auc(*column) for column in labelled.columns()]
        elif name == "GAUC":
            areas = [grouped_auc(*column, users) for column in labelled.columns()]
        elif name.startswith("AUC>="):
            areas = [self._threshold_auc(int(name.removeprefix("AUC>=")), labelled, actions)]
        elif name == "ACC":
            return {name: labelled.accuracy}
        elif name == "LOGLOSS":
            return {name: float(labelled.log_losses.mean())}
        elif name == "NE":
            defined = labelled.base_entropies > 0
            areas = np.divide(
                labelled.log_losses, labelled.base_entropies, where=defined, out=np.full(len(defined), nan)
            )
        else:
            raise ValueError(f"{name!r} is not a ranking metric; allowed: AUC, GAUC, ACC, LOGLOSS, NE, AUC>=K")
        result = {name: _mean_of_defined(name, np.asarray(areas))}
        if name in ("AUC", "GAUC") and self.num_tasks is not None and self.num_tasks > 1:
            result |= {f"{name}/task{task}": area for task, area in enumerate(areas)}
        return result

    def _threshold_auc(self, threshold: int, labelled: _Labelled, actions: np.ndarray) -> float:
        if self.num_tasks is not None:
            raise ValueError(f"AUC>={threshold} needs one task of several classes, not {self.num_tasks} binary tasks")
        at_least = labelled.scores[:, max(threshold - self.label_offset, 0) :].sum(axis=1)
        return auc(at_least, actions >= threshold)


@dataclass(frozen=True)
class _Labelled:
    """Predictions and labels as columns: one per task, or one per class of a single task."""

    scores: np.ndarray
    """float64 [M, columns]: logits of tasks or probabilities of classes."""
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


def _tasks(logits: np.ndarray, actions: np.ndarray) -> _Labelled:
    positive = (actions[:, None] >> np.arange(logits.shape[1]) & 1).astype(bool)
    rates = positive.mean(axis=0)
    return _Labelled(
        scores=logits,
        positive=positive,
        log_losses=np.logaddexp(0, np.where(positive, -logits, logits)).mean(axis=0),
        base_entropies=_entropy(rates) + _entropy(1 - rates),
        accuracy=float(((logits > 0) == positive).mean()),
    )


def _classes(logits: np.ndarray, classes: np.ndarray) -> _Labelled:
    num_classes = logits.shape[1]
    if classes.min() < 0 or classes.max() >= num_classes:
        raise ValueError(
            f"labels are classes {classes.min()} … {classes.max()}, but there are logits for {num_classes}"
        )
    log_probabilities = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    positive = classes[:, None] == np.arange(num_classes)
    return _Labelled(
        scores=np.exp(log_probabilities),
        positive=positive,
        log_losses=-log_probabilities[positive].mean(keepdims=True),
        base_entropies=_entropy(positive.mean(axis=0)).sum(keepdims=True),
        accuracy=float((logits.argmax(axis=1) == classes).mean()),
    )


def _entropy(rates: np.ndarray) -> np.ndarray:
    """−p log p of each rate; 0 at 0."""
    return -rates * np.log(np.where(rates > 0, rates, 1))


def _mean_of_defined(name: str, values: np.ndarray) -> float:
    """Mean over the tasks or classes for which a metric is defined; nan and a warning if there are none."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        logger.warning("%s is undefined (nan): the labels of the evaluation set are all of one class", name)
        return nan
    return float(defined.mean())


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

"""Exact metrics of ranking tasks over all predictions of the evaluation set. ``exchange``: see hstu.train.metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import NamedTuple

import numpy as np
from torch.distributed import ReduceOp

from hstu.config.args.task import LOWER_IS_BETTER, METRICS_OF_KIND, METRICS_PER_TASK, fits_kind
from hstu.parallel.exchange import ALONE, Exchange
from hstu.train.metrics import auc, check_classes, entropy, grouped_auc, logger, runs, without_rounding

ONE_CLASS = "the labels of the evaluation set are all of one class"


@dataclass(frozen=True)
class TaskMetrics:
    """Metrics of one task. ``METRICS_OF_KIND`` has their names.

    =========== ================ ==================== ======
    kind        predictions      labels               score
    =========== ================ ==================== ======
    binary      logit [M]        0 or 1               logit
    class       logits [M, C]    label_offset + class –
    regression  value [M]        value                value
    =========== ================ ==================== ======

    - AUC, GAUC (Zhou et al., KDD 2018): of classes the mean of one-vs-rest over classes with positives and negatives.
    - LOGLOSS: the mean cross entropy in nats. ACC: the fraction of correct predictions.
    - NE: LOGLOSS divided by the LOGLOSS of always predicting the base rate (He et al., ADKDD 2014).
    - AUC>=K: the AUC of the predicted P(label >= K), or of the score.
    - RMSE, MAE: of the score.
    - NDCG, NDCG@K: candidates of a request ordered by score, averaged over requests with different labels. The gain is
      the label, not 2^label − 1, because watch times would overflow. Equal scores get the expectation over their
      orders (McSherry & Najork, ECIR 2008).

    Scores of one user that differ by rounding alone are equal in AUC, GAUC and NDCG.
    """

    names: Sequence[str]
    kind: str
    _: KW_ONLY
    task: str = ""
    """Name of the task, for warnings."""
    label_offset: int = 0
    exchange: Exchange = ALONE
    warn: Callable[..., None] = logger.warning
    """Logs which metrics are undefined, and why."""

    def __post_init__(self) -> None:
        for name in self.names:
            if not fits_kind(name, self.kind):
                allowed = ", ".join(METRICS_OF_KIND[self.kind])
                raise ValueError(f"{name!r} is not a metric of {self.kind} tasks; allowed: {allowed}")

    @property
    def _subject(self) -> str:
        return f" of task {self.task!r}" if self.task else ""

    def compute(
        self, predictions: np.ndarray, labels: np.ndarray, users: np.ndarray, requests: np.ndarray
    ) -> dict[str, float]:
        """All metrics over the predictions of all ranks. M predictions of this rank, float32 [M] or [M, width].

        ``labels``: float [M]; a nan excludes its prediction. ``users``: int [M], ids that are equal on all ranks.
        ``requests``: int [M], different from the requests of other ranks.
        """
        known = ~np.isnan(labels)
        predictions, labels, users, requests = (each[known] for each in (predictions, labels, users, requests))
        if reason := self.undefined_reason(predictions):
            self.warn("metrics%s are undefined (nan): %s", self._subject, reason)
            return dict.fromkeys(self.names, math.nan)
        predictions, labels = predictions.astype(np.float64), labels.astype(np.float64)
        exact, tied = (self._answers(each, labels) for each in (predictions, without_rounding(predictions, users)))
        answers = {name: exact if name in (*LOWER_IS_BETTER, "ACC") else tied for name in self.names}
        return {name: self._compute_one(name, answers[name], users, requests) for name in self.names}

    def undefined_reason(self, predictions: np.ndarray) -> str | None:
        """Why no metric is defined; None if some may be."""
        has_infinite = not np.isfinite(predictions).all()
        num_rows, num_infinite = self.exchange.total([len(predictions), has_infinite])
        if not num_rows:
            return "the evaluation set has no labelled items"
        return "the model predicts values that are not finite" if num_infinite else None

    def _answers(self, predictions: np.ndarray, labels: np.ndarray) -> _Answers:
        if self.kind == "regression":
            return _Answers(labels, predictions.reshape(len(labels)), *[np.zeros(0)] * 3)
        levels = labels.astype(np.int64) - self.label_offset
        if self.exchange.total((levels + self.label_offset != labels).sum()):
            raise ValueError(f"labels{self._subject} must be whole numbers, but some are not")
        if self.kind == "class":
            check_classes(levels, predictions.shape[1], self.exchange)
            log_shares = predictions - np.logaddexp.reduce(predictions, axis=1, keepdims=True)
            positive = levels[:, None] == np.arange(predictions.shape[1])
            is_correct = predictions.argmax(axis=1) == levels
            return _Answers(labels, np.exp(log_shares), positive, -log_shares[positive], is_correct)
        check_classes(levels, 2, self.exchange)
        logits, positive = predictions.reshape(len(labels)), levels > 0
        log_losses = np.logaddexp(0, np.where(positive, -logits, logits))
        return _Answers(labels, logits, positive[:, None], log_losses, (logits > 0) == positive)

    def _compute_one(self, name: str, answers: _Answers, users: np.ndarray, requests: np.ndarray) -> float:
        labels, scores, exchange = answers.labels, answers.scores, self.exchange
        if name in ("AUC", "GAUC"):
            columns = zip(np.atleast_2d(scores.T), answers.positive.T, strict=True)
            areas = [auc(*of, exchange) if name == "AUC" else grouped_auc(*of, users, exchange) for of in columns]
            return self.mean(name, np.array(areas))
        if name.startswith("AUC>="):
            threshold = int(name.removeprefix("AUC>="))
            if self.kind == "class":
                at_least = np.cumsum(scores[:, ::-1], axis=1)[:, ::-1]
                scores = at_least[:, np.clip(threshold - self.label_offset, 0, scores.shape[1] - 1)]
            return self.mean(name, np.array([auc(scores, labels >= threshold, exchange)]))
        if name == "ACC":
            return float(exchange.mean(answers.is_correct))
        if name in ("LOGLOSS", "NE"):
            log_loss = exchange.mean(answers.log_losses)
            if name == "LOGLOSS":
                return float(log_loss)
            rates = exchange.mean(answers.positive)
            of_base = entropy(rates).sum() + (0 if self.kind == "class" else entropy(1 - rates).sum())
            return self.mean(name, np.array([log_loss / of_base if of_base > 0 else math.nan]))
        if name.startswith("NDCG"):
            return self._ndcg(name, scores, labels - self.label_offset, requests)
        # Sorting makes the sum independent of the assignment of samples to ranks.
        errors = np.sort(np.abs(labels - scores))
        return float(np.sqrt(exchange.mean(np.square(errors))) if name == "RMSE" else exchange.mean(errors))

    def _ndcg(self, name: str, scores: np.ndarray, gains: np.ndarray, requests: np.ndarray) -> float:
        if (lowest := -self.exchange.total((-gains).max(initial=0.0), ReduceOp.MAX)) < 0:
            reason = f"a gain must not be negative, but a label is {lowest + self.label_offset:g}"
            return self.mean(name, np.zeros(0), reason)
        cutoff = int(name.removeprefix("NDCG@")) if "@" in name else None
        values = ndcg_by_group(scores, gains, requests, cutoff)
        return self.mean(name, values, "no request has candidates with different labels", self.exchange)

    def mean(self, name: str, values: np.ndarray, reason: str = ONE_CLASS, exchange: Exchange = ALONE) -> float:
        """Mean of the values that are not nan; without any, nan and a warning with the ``reason``."""
        defined = values[~np.isnan(values)]
        if not exchange.total(len(defined)):
            self.warn("%s is undefined (nan): %s", name + self._subject, reason)
            return math.nan
        return float(exchange.mean(defined))


class _Answers(NamedTuple):
    """M predictions and their labels. The last three arrays are empty for values."""

    labels: np.ndarray
    """float64 [M]"""
    scores: np.ndarray
    """float64 [M], increasing with the predicted label; of classes their probabilities, [M, number of classes]."""
    positive: np.ndarray
    """bool [M, 1], or of classes [M, number of classes]."""
    log_losses: np.ndarray
    """float64 [M], nats: cross entropies."""
    is_correct: np.ndarray
    """bool [M]"""


def ranking_metrics(
    names: Sequence[str],
    logits: np.ndarray,
    actions: np.ndarray,
    users: np.ndarray,
    *,
    num_tasks: int | None,
    label_offset: int = 0,
    exchange: Exchange = ALONE,
) -> dict[str, float]:
    """TaskMetrics for predictions of the action: logits float [M, last], actions int [M], users int [M].

    The labels are one of:

    - tasks (``num_tasks`` = last): bit t of an action is the label of task t. Every metric is the mean over tasks. AUC
      and GAUC are also given per task, as ``AUC/task0`` ….
    - classes (``num_tasks`` = None): class = action − ``label_offset``.
    """
    if num_tasks is None:
        task = TaskMetrics(names, "class", label_offset=label_offset, exchange=exchange)
        return task.compute(logits, actions, users, users)
    task = TaskMetrics(names, "binary", exchange=exchange)
    bits = actions.astype(np.int64)[:, None] >> np.arange(num_tasks) & 1
    if num_tasks == 1 or task.undefined_reason(logits[:, 0]):
        return task.compute(logits[:, 0], bits[:, 0], users, users)
    quiet = replace(task, warn=logger.debug)
    each = [quiet.compute(logits[:, bit], bits[:, bit], users, users) for bit in range(num_tasks)]
    results: dict[str, float] = {}
    for name in names:
        values = np.array([found[name] for found in each])
        results[name] = task.mean(name, values)
        if name in METRICS_PER_TASK:
            results |= {f"{name}/task{bit}": float(value) for bit, value in enumerate(values)}
    return results


def ndcg_by_group(scores: np.ndarray, gains: np.ndarray, groups: np.ndarray, cutoff: int | None = None) -> np.ndarray:
    """NDCG per group, float64 [number of distinct groups], in ascending order of groups.

    scores, gains (not negative) and groups are [N]. The gain at rank r counts 1 / log2(r + 1), and 0 beyond the cutoff.
    Equal scores: the expectation over their orders. nan for a group whose gains are all equal.
    """
    if not len(scores):
        return np.zeros(0)
    best_first, ideal = np.lexsort((gains, -scores, groups)), np.lexsort((-gains, groups))
    groups, scores, gains, ideal_gains = groups[ideal], scores[best_first], gains[best_first], gains[ideal]
    (starts, lengths), (tie_starts, tie_lengths) = runs(groups), runs(groups, scores)
    ranks = np.arange(len(groups)) - np.repeat(starts, lengths) + 1
    discounts = (ranks <= (cutoff or np.inf)) / np.log2(ranks + 1)
    expected_gains = np.repeat(np.add.reduceat(gains, tie_starts) / tie_lengths, tie_lengths)
    defined = ideal_gains[starts] != ideal_gains[starts + lengths - 1]
    reached, possible = (np.add.reduceat(values * discounts, starts) for values in (expected_gains, ideal_gains))
    return np.divide(reached, possible, where=defined, out=np.full(len(starts), np.nan))

"""Exact metrics of ranking tasks over all predictions of the evaluation set. ``exchange``: see hstu.train.metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from torch.distributed import ReduceOp

from hstu.config.args.task import LOWER_IS_BETTER, METRICS_OF_KIND, METRICS_PER_TASK, fits_kind
from hstu.parallel.exchange import ALONE, Exchange
from hstu.train.metrics import (
    CLASSIFICATION_METRICS,
    Classified,
    auc,
    binary,
    check_classes,
    classes,
    logger,
    run_starts,
    undefined_without_warning,
    without_rounding,
)

ONE_CLASS = "the labels of the evaluation set are all of one class"


class TaskMetrics:
    """Collects predictions of one task and computes its metrics. ``METRICS_OF_KIND`` has their names.

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
    - XAUC: the fraction of pairs of different labels that the scores order correctly; equal scores count one half (Zhan
      et al., KDD 2022).
    - NDCG, NDCG@K: candidates of a request ordered by score, averaged over requests with different labels. The gain is
      the label, not 2^label − 1, because watch times would overflow. Equal scores get the expectation over their
      orders (McSherry & Najork, ECIR 2008).

    Scores of one user that differ by rounding alone are equal in AUC, GAUC, XAUC and NDCG.

    ``task``: name of the task, for warnings.
    """

    def __init__(
        self, names: Sequence[str], kind: str, *, task: str = "", label_offset: int = 0, exchange: Exchange = ALONE
    ) -> None:
        self.names = tuple(names)
        self.subject = f" of task {task!r}" if task else ""
        for name in names:
            if not fits_kind(name, kind):
                allowed = ", ".join(METRICS_OF_KIND[kind])
                raise ValueError(f"{name!r} is not a metric of {kind} tasks; allowed: {allowed}")
        self.kind, self.exchange = kind, exchange
        self.label_offset = label_offset
        self._chunks: list[tuple[np.ndarray, ...]] = []

    def update(self, predictions: np.ndarray, labels: np.ndarray, users: np.ndarray, requests: np.ndarray) -> None:
        """Add M predictions, float [M] or [M, width]; see the class.

        ``labels``: float [M]; a nan excludes its prediction. ``users``: int [M], ids that are equal on all ranks.
        ``requests``: int [M], different from the requests of other ranks.
        """
        known = ~np.isnan(labels)
        others = labels.astype(np.float64), users.astype(np.int64), requests.astype(np.int64)
        self._chunks.append((predictions.astype(np.float32)[known], *(values[known] for values in others)))

    def compute(self) -> dict[str, float]:
        """All metrics over the predictions of all ranks."""
        if reason := self.undefined_reason():
            logger.warning("metrics%s are undefined (nan): %s", self.subject, reason)
            return dict.fromkeys(self.names, math.nan)
        predictions, labels, users, requests = (np.concatenate(parts) for parts in zip(*self._chunks, strict=True))
        predictions = predictions.astype(np.float64)
        exact, tied = (self._answers(each, labels) for each in (predictions, without_rounding(predictions, users)))
        answers = {name: exact if name in (*LOWER_IS_BETTER, "ACC") else tied for name in self.names}
        return {name: self._compute_one(name, answers[name], users, requests) for name in self.names}

    def undefined_reason(self) -> str | None:
        """Why no metric is defined; None if some may be."""
        has_infinite = not all(np.isfinite(chunk[0]).all() for chunk in self._chunks)
        num_rows, num_infinite = self.exchange.total([sum(len(chunk[0]) for chunk in self._chunks), has_infinite])
        if not num_rows:
            return "the evaluation set has no labelled items"
        return "the model predicts values that are not finite" if num_infinite else None

    def _answers(self, predictions: np.ndarray, labels: np.ndarray) -> _Answers:
        if self.kind == "regression":
            return _Answers(labels, predictions.reshape(len(labels)))
        levels = labels.astype(np.int64) - self.label_offset
        if self.exchange.total((levels + self.label_offset != labels).sum()):
            raise ValueError(f"labels{self.subject} must be whole numbers, but some are not")
        if self.kind == "class":
            classified = classes(predictions, levels, self.exchange)
            at_least = np.cumsum(classified.scores[:, ::-1], axis=1)[:, ::-1]
            return _Answers(labels, None, classified, at_least)
        check_classes(levels, 2, self.exchange)
        scores = predictions.reshape(len(labels))
        return _Answers(labels, scores, binary(scores[:, None], levels[:, None] > 0, self.exchange))

    def _compute_one(self, name: str, answers: _Answers, users: np.ndarray, requests: np.ndarray) -> float:
        if name in CLASSIFICATION_METRICS:
            found = cast(Classified, answers.classified)
            return self._mean(name, CLASSIFICATION_METRICS[name](found, users, self.exchange))
        if name.startswith("AUC>="):
            threshold = int(name.removeprefix("AUC>="))
            area = auc(self._at_least(threshold, answers), answers.labels >= threshold, self.exchange)
            return self._mean(name, np.array([area]))
        scores = cast(np.ndarray, answers.scores)
        if name.startswith("NDCG"):
            return self._ndcg(name, scores, answers.labels, requests)
        if name == "XAUC":
            share = np.array([ordered_pairs(scores, answers.labels, self.exchange)])
            return self._mean(name, share, "all labels of the evaluation set are equal")
        # Sorting makes the sum independent of the assignment of samples to ranks.
        errors = np.sort(np.abs(answers.labels - scores))
        return float(np.sqrt(self.exchange.mean(np.square(errors))) if name == "RMSE" else self.exchange.mean(errors))

    def _mean(self, name: str, values: np.ndarray, reason: str = ONE_CLASS, exchange: Exchange = ALONE) -> float:
        return mean_of_defined(name + self.subject, values, reason, exchange)

    def _at_least(self, threshold: int, answers: _Answers) -> np.ndarray:
        """Scores of the event that the label is at least ``threshold``, float64 [M]."""
        if answers.at_least is None:
            return cast(np.ndarray, answers.scores)
        return answers.at_least[:, np.clip(threshold - self.label_offset, 0, answers.at_least.shape[1] - 1)]

    def _ndcg(self, name: str, scores: np.ndarray, labels: np.ndarray, requests: np.ndarray) -> float:
        gains = labels - self.label_offset
        if (lowest := -self.exchange.total((-gains).max(initial=0.0), ReduceOp.MAX)) < 0:
            reason = f"a gain must not be negative, but a label is {lowest + self.label_offset:g}"
            return self._mean(name, np.zeros(0), reason)
        cutoff = int(name.removeprefix("NDCG@")) if "@" in name else None
        values = ndcg_by_group(scores, gains, requests, cutoff)
        return self._mean(name, values, "no request has candidates with different labels", self.exchange)


class RankingMetrics:
    """TaskMetrics for predictions of the action, whose logits have width ``last``. The labels are one of:

    - tasks (``num_tasks`` = last): bit t of an action is the label of task t. Every metric is the mean over tasks. AUC
      and GAUC are also given per task, as ``AUC/task0`` ….
    - classes (``num_tasks`` = None): class = action − ``label_offset``.
    """

    def __init__(
        self, names: Sequence[str], *, num_tasks: int | None, label_offset: int = 0, exchange: Exchange = ALONE
    ) -> None:
        kind = "class" if num_tasks is None else "binary"
        self._tasks = [
            TaskMetrics(names, kind, label_offset=label_offset, exchange=exchange) for _ in range(num_tasks or 1)
        ]
        self._is_binary = num_tasks is not None

    def update(self, logits: np.ndarray, actions: np.ndarray, users: np.ndarray) -> None:
        """Add M predictions: logits float [M, last], actions int [M], users int [M] (any id per user)."""
        for bit, task in enumerate(self._tasks):
            labels = actions.astype(np.int64) >> bit & 1 if self._is_binary else actions
            task.update(logits[:, bit] if self._is_binary else logits, labels, users, users)

    def compute(self) -> dict[str, float]:
        """All metrics over the predictions."""
        first, *others = self._tasks
        if not others or first.undefined_reason():
            return first.compute()
        with undefined_without_warning():
            each = [task.compute() for task in self._tasks]
        results: dict[str, float] = {}
        for name in first.names:
            values = np.array([found[name] for found in each])
            results[name] = mean_of_defined(name, values)
            if name in METRICS_PER_TASK:
                results |= {f"{name}/task{task}": float(value) for task, value in enumerate(values)}
        return results


def mean_of_defined(name: str, values: np.ndarray, reason: str = ONE_CLASS, exchange: Exchange = ALONE) -> float:
    """Mean of the values that are not nan; without any, nan and a warning with the ``reason``."""
    defined = values[~np.isnan(values)]
    if not exchange.total(len(defined)):
        logger.warning("%s is undefined (nan): %s", name, reason)
        return math.nan
    return float(exchange.mean(defined))


@dataclass(frozen=True)
class _Answers:
    labels: np.ndarray
    """float64 [M]"""
    scores: np.ndarray | None
    """float64 [M], increasing with the predicted label; None for classes."""
    classified: Classified | None = None
    """Predictions of binary tasks and classes."""
    at_least: np.ndarray | None = None
    """float64 [M, number of classes]: scores of "the label is at least label_offset + column"."""


def ordered_pairs(scores: np.ndarray, labels: np.ndarray, exchange: Exchange = ALONE) -> float:
    """Fraction of pairs with different labels that ``scores`` order as the labels; ties count one half; O(N log N).

    Over ranks, each first counts the pairs within a range of labels. Each then gets a range of scores and counts, of
    pairs that were on two ranks, those within its range and those with lower scores on another rank.
    """
    labels, scores = exchange.by_value(labels, scores)
    pairs, ordered = _ordered(scores, labels)
    num_rows = exchange.total(len(labels)).astype(np.float64)
    pairs += (float(num_rows) * len(labels) - len(labels) ** 2) / 2  # labels of two ranks are different
    if exchange.size > 1:
        ranks = np.arange(exchange.size)
        scores, of_rank = exchange.by_value(scores, np.full(len(scores), exchange.rank))
        counts = np.bincount(of_rank, minlength=exchange.size)
        (by_score,) = exchange.to_owners(ranks, counts)  # rows of this rank's labels, by the rank of their scores
        (lower,) = exchange.to_owners(ranks, np.cumsum(by_score) - by_score)
        ordered += _ordered(scores, of_rank)[1] + float((counts * (np.cumsum(lower) - lower)).sum())
    pairs, ordered = exchange.total([pairs, ordered])
    return float(ordered / pairs) if pairs else math.nan


def _ordered(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(number of pairs with different labels, number that ``scores`` order as the labels)."""
    # Sorted by label, the later row of a pair has the larger label. Ties are broken by score.
    order = np.lexsort((scores, labels))
    scores, labels = scores[order], labels[order]
    pairs = int((len(labels) - _run_ends(labels)).sum())
    by_score = np.argsort(scores, kind="stable")
    ties = int((_run_ends(scores[by_score]) - _run_ends(scores[by_score], labels[by_score])).sum())
    ranks = np.empty_like(by_score)
    ranks[by_score] = np.arange(len(scores))
    return pairs, pairs - _inversions(ranks) - ties / 2


def _run_ends(*keys: np.ndarray) -> np.ndarray:
    """For each element of sorted arrays, the index after the last element with the same combination of keys."""
    starts = run_starts(*keys)
    ends = np.append(starts[1:], len(keys[0]))
    return np.repeat(ends, ends - starts)


def _inversions(ranks: np.ndarray) -> int:
    """Number of pairs i < j with ranks[i] > ranks[j]. ``ranks``: a permutation of 0 … N − 1.

    A radix sort from the highest bit on keeps the order within each group of equal higher bits. An inverted pair is
    counted at the bit that separates its group.
    """
    total = 0
    for bit in reversed(range(len(ranks).bit_length())):
        is_upper = (ranks >> bit & 1).astype(bool)
        group_starts = ranks >> (bit + 1) << (bit + 1)
        upper_before = np.concatenate([[0], np.cumsum(is_upper)])
        uppers = upper_before[:-1] - upper_before[group_starts]
        total += int(uppers[~is_upper].sum())
        lowers = np.arange(len(ranks)) - group_starts - uppers
        moved = np.empty_like(ranks)
        moved[group_starts + np.where(is_upper, (1 << bit) + uppers, lowers)] = ranks
        ranks = moved
    return total


def ndcg_by_group(scores: np.ndarray, gains: np.ndarray, groups: np.ndarray, cutoff: int | None = None) -> np.ndarray:
    """NDCG per group, float64 [number of distinct groups], in ascending order of groups.

    scores, gains (not negative) and groups are [N]. The gain at rank r counts 1 / log2(r + 1), and 0 beyond the cutoff.
    Equal scores: the expectation over their orders. nan for a group whose gains are all equal.
    """
    if not len(scores):
        return np.zeros(0)
    best_first, ideal = np.lexsort((gains, -scores, groups)), np.lexsort((-gains, groups))
    groups, scores, gains, ideal_gains = groups[ideal], scores[best_first], gains[best_first], gains[ideal]
    starts, tie_starts = run_starts(groups), run_starts(groups, scores)
    lengths, tie_lengths = np.diff(starts, append=len(groups)), np.diff(tie_starts, append=len(groups))
    ranks = np.arange(len(groups)) - np.repeat(starts, lengths) + 1
    discounts = (ranks <= (cutoff or np.inf)) / np.log2(ranks + 1)
    expected_gains = np.repeat(np.add.reduceat(gains, tie_starts) / tie_lengths, tie_lengths)
    defined = ideal_gains[starts] != ideal_gains[starts + lengths - 1]
    reached, possible = (np.add.reduceat(values * discounts, starts) for values in (expected_gains, ideal_gains))
    return np.divide(reached, possible, where=defined, out=np.full(len(starts), np.nan))

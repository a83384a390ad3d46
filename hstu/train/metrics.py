"""Exact metrics in float64: areas under ROC curves, classification metrics and retrieval metrics.

Ties get midranks: equal scores count one half in an AUC, and a retrieval target ranks in the middle of equal scores.
A metric that the data does not define (one class only, nothing evaluated) is nan, and a warning gives the reason.
``exchange``: the ranks that divide the rows, so that all rows of a user are on one of them. Results are equal on all.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from torch.distributed import ReduceOp

from hstu.base.hashing import hash_ids
from hstu.parallel.exchange import ALONE, Exchange

logger = logging.getLogger(__name__)

_NO_LABEL = -(1 << 62)
"""The largest label of a rank without rows."""
_GROUPS, _T = 20, 2.093
"""Groups of users of a jackknife, and the 97.5 % point of Student's t with a degree of freedom less."""
ROUNDING = 32 * float(np.finfo(np.float32).eps)
"""4e-6: scores of a user that differ by less, relative to the user's largest |score|, are equal but for rounding."""


def auc_by_group(scores: np.ndarray, positive: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each group, float64, in ascending order of groups; nan unless both classes occur.

    scores [N], positive bool [N], groups integer [N].
    """
    midranks = pd.Series(scores).groupby(groups).rank()
    rows = pd.DataFrame({"positives": positive, "negatives": ~positive, "rank_sum": midranks * positive})
    found = rows.astype(np.float64).groupby(groups).sum()
    # Mann–Whitney U: ranks within the group minus ranks of the positives among themselves.
    ordered = found.rank_sum - found.positives * (found.positives + 1) / 2
    return (ordered / (found.positives * found.negatives)).to_numpy()


def without_rounding(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Make scores equal that differ only by the rounding of float32. Independent of the order of rows.

    Equal candidates may get such scores, because the order of sums depends on the batch and the number of ranks.
    Closeness is not transitive, so sorted scores of a group form runs, in which each is within ROUNDING of the one
    before. A run gets its smallest score, unless its ends are farther apart: such runs are many different scores.

    scores float64 [N] or [N, columns], each column for itself; groups integer [N].
    """
    if scores.ndim == 2:
        return np.stack([without_rounding(column, groups) for column in scores.T], axis=1)
    if not len(scores):
        return scores
    order = np.lexsort((scores, groups))
    ordered, groups = scores[order], groups[order]
    starts, lengths = runs(groups)
    tolerance = ROUNDING * np.repeat(np.maximum.reduceat(np.abs(ordered), starts), lengths)
    starts, lengths = runs(groups, np.cumsum(np.diff(ordered, prepend=ordered[0]) > tolerance))
    first, last = (np.repeat(ordered[ends], lengths) for ends in (starts, starts + lengths - 1))
    found = np.empty_like(scores)
    found[order] = np.where(last - first <= tolerance, first, ordered)
    return found


def runs(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first index, length) of each run of a combination of keys, in sorted arrays of at least one element."""
    changes = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    return starts, np.diff(starts, append=len(keys[0]))


def auc(scores: np.ndarray, positive: np.ndarray, exchange: Exchange = ALONE) -> float:
    """Area under the ROC curve; nan unless both classes occur.

    Exact: each rank counts the pairs of a range of scores. Of equal scores a rank sends one, with their counts.
    """
    scores, counts = _counted(scores, np.stack([positive, ~positive], axis=1))
    if exchange.size > 1:
        scores, counts = _counted(*exchange.by_value(scores, counts))
    positives, negatives = counts.T
    below = exchange.gathered(negatives.sum(keepdims=True))[: exchange.rank].sum() + np.cumsum(negatives) - negatives
    ordered = exchange.total((positives * (below + negatives / 2)).sum())
    pairs = math.prod(exchange.total(counts.sum(axis=0)).tolist())
    return float(ordered / pairs) if pairs else math.nan


def _counted(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, ascending, and the sums of their rows of ``counts``, int64 [n, columns]."""
    sums = pd.DataFrame(counts.astype(np.int64)).groupby(values).sum()
    return sums.index.to_numpy(), sums.to_numpy()


def grouped_auc(scores: np.ndarray, positive: np.ndarray, users: np.ndarray, exchange: Exchange = ALONE) -> float:
    """GAUC: mean of the AUCs of users with both classes, weighted by their impressions."""
    areas = auc_by_group(scores, positive, users)
    impressions = np.unique(users, return_counts=True)[1]
    defined = ~np.isnan(areas)
    weighted = np.array([(areas * impressions)[defined].sum(), impressions[defined].sum()])
    total, weight = exchange.total(weighted)
    return float(total / weight) if weight else math.nan


def half_widths(metrics: Callable[[np.ndarray], Mapping[str, float]], users: np.ndarray) -> dict[str, float]:
    """Half of a 95 % interval of each metric over users, by a jackknife that leaves out a group of users at a time.

    ``metrics``: computes them from some rows, bool [N]; collective where ranks divide the rows. ``users``: int64 [N].
    Metrics that are undefined without a group have no interval.
    """
    groups = hash_ids(users, _GROUPS)
    found = [metrics(groups != group) for group in range(_GROUPS)]
    values = {name: np.array([each.get(name, math.nan) for each in found]) for name in found[0]}
    halves = {name: _T * float(np.sqrt((_GROUPS - 1) * of.var())) for name, of in values.items()}
    return {name: half for name, half in halves.items() if math.isfinite(half)}


def check_classes(labels: np.ndarray, num_classes: int, exchange: Exchange = ALONE) -> None:
    """Raises ValueError on all ranks unless all labels are in [0, num_classes)."""
    ends = [(-labels).max(initial=_NO_LABEL), labels.max(initial=_NO_LABEL)]
    lowest, highest = exchange.total(ends, ReduceOp.MAX)
    if lowest > 0 or highest >= num_classes:
        raise ValueError(f"labels are classes {-lowest} … {highest}, but there are logits for {num_classes}")


def entropy(rates: np.ndarray) -> np.ndarray:
    """−p log p of each rate; 0 at 0."""
    return -rates * np.log(np.where(rates > 0, rates, 1))


def retrieval_metrics(names: Sequence[str], ranks: np.ndarray, exchange: Exchange = ALONE) -> dict[str, float]:
    """Means over queries of HR@K, NDCG@K, MRR@K and MRR, from the targets' ranks (1 is best); nan without queries.

    HR@K: rank <= K. NDCG@K: 1 / log2(rank + 1) and MRR@K: 1 / rank, both 0 beyond K. MRR: no K.
    """
    if not exchange.total(len(ranks)):
        logger.warning("metrics are undefined (nan): the evaluation set has no queries")
        return dict.fromkeys(names, math.nan)
    ordered = np.sort(ranks.astype(np.float64))  # makes sums independent of the assignment of queries to ranks
    return {name: float(exchange.mean(retrieval_gains(name, ordered))) for name in names}


def retrieval_gains(name: str, ranks: np.ndarray) -> np.ndarray:
    """What each query adds to the mean that ``retrieval_metrics`` returns, [N]."""
    kind, _, cutoff = name.partition("@")
    hits = ranks <= (int(cutoff) if cutoff else np.inf)
    if kind == "HR":
        return hits
    if kind == "NDCG":
        return hits / np.log2(ranks + 1)
    if kind == "MRR":
        return hits / ranks
    raise ValueError(f"{name!r} is not a retrieval metric; allowed: HR@K, NDCG@K, MRR@K, MRR")

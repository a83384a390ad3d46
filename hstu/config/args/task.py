"""Options of the two tasks: ranking and retrieval."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hstu.config.option import Args, option

METRICS_PER_TASK = ("AUC", "GAUC")
"""Ranking metrics that a run with several tasks also reports per task, as "AUC/task0"."""
LOWER_IS_BETTER = ("LOGLOSS", "NE", "RMSE", "MAE")
"""Metrics whose best value is the smallest."""
_CLASSIFICATION = ("AUC", "GAUC", "NE", "LOGLOSS", "ACC")
_VALUES = ("AUC>=K", "RMSE", "MAE", "XAUC", "NDCG", "NDCG@K")
METRICS_OF_KIND = {
    "binary": (*_CLASSIFICATION, "NDCG", "NDCG@K"),
    "class": (*_CLASSIFICATION, "AUC>=K"),
    "ordinal": (*_CLASSIFICATION, *_VALUES),
    "regression": _VALUES,
    "censored": _VALUES,
}
"""Kind of a ranking task → the metrics that it has. K stands for any number."""


def fits_kind(metric: str, kind: str) -> bool:
    """Whether a metric such as "NDCG@10" is one of a kind of ranking task."""
    return re.sub(r"(?<=@)[1-9]\d*$|(?<=>=)\d+$", "K", metric) in METRICS_OF_KIND[kind]


@dataclass(frozen=True, kw_only=True)
class RankingArgs(Args):
    """The ranking task."""

    prediction_head_arch: list[int] = option(not_empty=True, minimum=1, maximum=1_000_000)
    """Widths of the layers of the prediction head. The last one is num_tasks, or the number of classes if there is one
    task."""
    prediction_head_act_type: str = option("relu", choices=("relu", "gelu"))
    """Activation between the layers of the prediction head."""
    prediction_head_bias: bool = option(True)
    """Whether the layers of the prediction head have a bias."""
    num_tasks: int = option(1, minimum=1)
    """Number of tasks. If the last width is num_tasks, each task has one sigmoid and its label is one bit of the
    action. Otherwise there is one multi-class task."""
    eval_metrics: tuple[str, ...] = option(
        ("AUC",),
        pattern=r"AUC|GAUC|ACC|LOGLOSS|NE|AUC>=\d+",
        examples=("AUC", "AUC>=K", "GAUC", "ACC", "LOGLOSS", "NE"),
        not_empty=True,
        capitals=True,
    )
    """Metrics. AUC>=K is the AUC of "the class is at least K", for star ratings."""


@dataclass(frozen=True, kw_only=True)
class RetrievalArgs(Args):
    """The retrieval task."""

    num_negatives: int = option(-1, minimum=-1, maximum=10_000_000)
    """Negatives per position, for mixed those beside the items of the batch. -1 or 0: all distinct items of the batch
    (in_batch) or the whole corpus (full)."""
    temperature: float = option(0.05, minimum=1e-6, maximum=1e6)
    """Temperature of the softmax."""
    l2_norm_eps: float = option(1e-6, above=0, maximum=1e6)
    """Lower bound of the norms by which queries and items are divided."""
    negatives: str = option("in_batch", choices=("in_batch", "uniform", "popularity", "mixed", "full"))
    """in_batch: the distinct items of the batch over all data-parallel ranks. uniform: random draws from the corpus.
    popularity: draws from the corpus by how often the training samples have an item; one that they lack is never drawn.
    mixed: the items of the batch and num_negatives draws from the corpus that all positions share (Yang et al., WWW
    2020). full: a softmax over the whole corpus."""
    shared_negatives: bool = option(False)
    """uniform, popularity: draw one set of negatives for the whole global batch instead of one set per position."""
    popularity_exponent: float | None = option(None, above=0, maximum=10)
    """popularity, mixed: draw items in proportion to their number in the training samples to this power. None: 0.75 for
    popularity; mixed draws uniformly."""
    logq_correction: bool = option(False)
    """Subtract log Q from the logit of each negative, where Q is how often the item is expected among the negatives:
    the sampled softmax then estimates that of the whole corpus. The target is always there, so its logit stays (Bengio
    and Senécal, 2003)."""
    filter_seen: bool = option(True)
    """Evaluation: exclude the items that the user has seen."""
    request_time: str = option("last_event", choices=("last_event", "target"))
    """Evaluation with relative_bias: when the user asks. last_event: at the time of the last event of the history.
    target: at the time of the held-out event, as in the published results."""
    eval_metrics: tuple[str, ...] = option(
        ("HR@10", "NDCG@10"),
        pattern=r"(HR|NDCG|MRR)@[1-9]\d*|MRR",
        examples=("HR@K", "NDCG@K", "MRR@K", "MRR"),
        not_empty=True,
        capitals=True,
    )
    """Metrics, with any K."""

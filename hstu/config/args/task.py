"""Options of the tasks ranking and retrieval."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Optional

from hstu.config.option import STORED_DATA, Args, having, not_having, option

OF_BINARY = having("kind", "binary", strict=True)
METRICS_PER_TASK = ("AUC", "GAUC")
"""Ranking metrics that a run with several tasks also reports per task, as "AUC/task0"."""
LOWER_IS_BETTER = ("LOGLOSS", "NE", "RMSE", "MAE")
"""Metrics whose best value is the smallest."""
AT_LAST_EVENT = "last_event"
"""Retrieval metrics of queries at the time of the last event are named as "HR@10/last_event"."""
_CLASSIFICATION = ("AUC", "GAUC", "NE", "LOGLOSS", "ACC")
_OF_CLASSES = ("AUC", "AUC>=K", "GAUC", "ACC", "LOGLOSS", "NE")
_VALUES = ("AUC>=K", "RMSE", "MAE", "NDCG", "NDCG@K")
METRICS_OF_KIND = {
    "binary": (*_CLASSIFICATION, "NDCG", "NDCG@K"),
    "class": (*_CLASSIFICATION, "AUC>=K"),
    "regression": _VALUES,
}
"""Kind of a ranking task → allowed metrics. K stands for any number."""


def _pattern(metrics: Iterable[str]) -> str:
    """Regular expression of metrics. K stands for any number."""
    return "|".join(metrics).replace("@K", r"@[1-9]\d*").replace(">=K", r">=\d+")


def fits_kind(metric: str, kind: str) -> bool:
    """Whether a kind of ranking task allows a metric such as "NDCG@10"."""
    return re.fullmatch(_pattern(METRICS_OF_KIND[kind]), metric) is not None


def _metrics(default: Any, metrics: tuple[str, ...], **others: Any) -> Any:
    """An option of some of these metrics."""
    limits: dict[str, Any] = {"pattern": _pattern(metrics), "not_empty": True, "capitals": True}
    return option(default, changes="reports", examples=metrics, **limits, **others)


LOSSES = {
    "binary": ("bce", "focal"),
    "class": ("cross_entropy",),
    "regression": ("mse", "huber"),
}
"""Kind of a ranking task → allowed losses, the default first."""
CONDITION = re.compile(r"(>=) *(-?\d+(?:\.\d+)?)|(&) *([1-9]\d{0,6})")
"""A condition of positive_values: sign and number."""
DEFAULT_METRIC = {"binary": "AUC", "class": "ACC", "regression": "RMSE"}
"""Kind of a ranking task → default metric."""


class RankingTaskArgs(Args):
    """One of RankingArgs.tasks: what is predicted of an item, how it is learnt, and what is measured."""

    label: str = option(changes="training", not_empty=True)
    """The feature of the data that holds the labels: the action, or a feature of the events. Texts that are numbers
    count as these numbers; "unknown" is a missing label, which adds nothing to the loss and to the metrics."""
    name: Optional[str] = option(None, changes="reports", pattern=r"[a-z_][a-z0-9_]*", examples=("click", "watch_time"))
    """Name of the task in metrics, such as click in "AUC/click". None: the label, in lower case."""
    kind: str = option("binary", changes="model", choices=tuple(LOSSES))
    """binary: positive or negative. class: one of num_classes. regression: a number, such as stars."""
    loss: Optional[str] = option(
        None, changes="training", choices=tuple(loss for losses in LOSSES.values() for loss in losses)
    )
    """binary: bce or focal (arXiv 1708.02002, gamma = 2). class: cross_entropy. regression: mse or huber. None: the
    first of the kind."""
    weight: float = option(1.0, changes="training", above=0, maximum=1e6)
    """Factor of the loss. The loss of a run is the sum over the tasks of weight times the mean over the labelled items,
    in which items without a label count as 0."""
    positive_values: Optional[list[str]] = option(None, changes="training", not_empty=True, needs=OF_BINARY)
    """binary: the positive labels: texts such as ["cart", "purchase"], or one condition on numbers: [">= 4"], labels of
    at least 4; ["& 6"], labels that have one of these bits, for actions that are sets of bits. None: labels are 0 and
    1."""
    num_classes: Optional[int] = option(
        None, changes="model", minimum=2, maximum=1_000_000, needs=having("kind", "class", strict=True)
    )
    """class: number of classes. Labels are 0 to num_classes - 1; or 1 to num_classes, if num_classes occurs
    and 0 does not. Labels may be texts, which are numbered in alphabetical order."""
    scale: float = option(1.0, changes="model", above=0, maximum=1e12, needs=having("kind", "regression", strict=True))
    """regression: the loss compares with label / scale; predictions and metrics are in units of the label. Choose about
    the usual size of a label. huber is linear beyond an error of scale."""
    metrics: Optional[tuple[str, ...]] = _metrics(None, (*_OF_CLASSES, "RMSE", "MAE", "NDCG", "NDCG@K"))
    """Metrics, reported as "AUC/click". NDCG ranks the candidates of a request. None: AUC of binary, ACC of class,
    RMSE of regression."""

    @property
    def task_name(self) -> str:
        """The name of the task in metrics."""
        return self.name or re.sub(r"\W", "_", self.label.lower(), flags=re.ASCII)

    @property
    def positive_texts(self) -> Optional[list[str]]:
        """The positive labels if positive_values lists texts."""
        return None if self._condition else self.positive_values

    @property
    def positive_from(self) -> Optional[float]:
        """The least positive label of a condition such as ">= 4"."""
        return float(self._condition[2]) if self._condition and self._condition[1] else None

    @property
    def bit_mask(self) -> Optional[int]:
        """The bits of a condition such as "& 6"."""
        return int(self._condition[4]) if self._condition and self._condition[3] else None

    @property
    def _condition(self) -> Optional[re.Match[str]]:
        values = self.positive_values or []
        return CONDITION.fullmatch(values[0]) if len(values) == 1 else None

    @property
    def loss_in_force(self) -> str:
        """The effective loss, never None."""
        return self.loss or LOSSES[self.kind][0]

    @property
    def metrics_in_force(self) -> tuple[str, ...]:
        """The effective metrics, never None."""
        return self.metrics or (DEFAULT_METRIC[self.kind],)

    @property
    def output_width(self) -> int:
        """Number of outputs of the head: one per class, or one."""
        return self.num_classes or 1 if self.kind == "class" else 1


class RankingArgs(Args):
    """The ranking task."""

    tasks: Optional[list[RankingTaskArgs]] = option(
        None, changes="model", not_empty=True, needs=replace(STORED_DATA, strict=True)
    )
    """What is predicted, such as [@click/RankingTaskArgs(), @stars/RankingTaskArgs()]. None: the action, see
    num_tasks."""
    task_sharing: str = option(
        "shared", changes="model", choices=("shared", "mmoe", "ple"), needs=not_having("tasks", None)
    )
    """tasks: what they share of the head. shared: all hidden layers. mmoe: experts, weighted by a gate per task (Ma et
    al., KDD 2018). ple: shared experts and some of each task's own (Tang et al., RecSys 2020)."""
    num_experts: int = option(4, changes="model", minimum=1, maximum=1024, needs=having("task_sharing", "mmoe", "ple"))
    """mmoe: number of experts. ple: number of shared experts, and of each task's own."""
    prediction_head_arch: list[int] = option(changes="model", not_empty=True, minimum=1, maximum=1_000_000)
    """Widths of the layers of the prediction head. The last one is num_tasks, or the number of classes if there is one
    task. With tasks: widths of the hidden layers, which a layer with the outputs of each task follows."""
    prediction_head_act_type: str = option("relu", changes="model", choices=("relu", "gelu"))
    """Activation between the layers of the prediction head."""
    prediction_head_bias: bool = option(True, changes="model")
    """Whether the layers of the prediction head have a bias."""
    num_tasks: int = option(1, changes="model", minimum=1, excludes={"tasks": "there is one RankingTaskArgs per task"})
    """Number of tasks. If the last width is num_tasks, each task has one sigmoid and its label is one bit of the
    action. Otherwise there is one multi-class task."""
    eval_metrics: tuple[str, ...] = _metrics(
        ("AUC",), _OF_CLASSES, excludes={"tasks": "each task has its own: use RankingTaskArgs.metrics"}
    )
    """Metrics. AUC>=K is the AUC of "the class is at least K", for star ratings."""

    @property
    def num_classes(self) -> int:
        """Classes of the action; 0 if something else is predicted."""
        is_of_bits = self.tasks is not None or self.prediction_head_arch[-1] == self.num_tasks
        return 0 if is_of_bits else self.prediction_head_arch[-1]

    @property
    def loss_names(self) -> list[str]:
        """Names of the tasks in metrics, each of which has a part of the loss; empty if there is one task."""
        bits = 0 if self.num_classes else self.num_tasks
        names = [task.task_name for task in self.tasks or ()] or [f"task{bit}" for bit in range(bits)]
        return names if len(names) > 1 else []


class RetrievalArgs(Args):
    """The retrieval task."""

    num_negatives: int = option(-1, changes="training", minimum=-1, maximum=10_000_000)
    """Negatives per position, for mixed those beside the items of the batch. -1 or 0: all distinct items of the batch
    (in_batch) or the whole corpus (full)."""
    temperature: float = option(0.05, changes="training", minimum=1e-6, maximum=1e6)
    """Temperature of the softmax."""
    l2_norm_eps: float = option(1e-6, changes="training", above=0, maximum=1e6)
    """Lower bound of the norms by which queries and items are divided."""
    negatives: str = option("in_batch", changes="training", choices=("in_batch", "uniform", "mixed", "full"))
    """in_batch: the distinct items of the batch over all data-parallel ranks. uniform: random draws from the corpus.
    mixed: the items of the batch and num_negatives draws from the corpus that all positions share (Yang et al., WWW
    2020); on MovieLens it did not gain over uniform. full: a softmax over the whole corpus."""
    shared_negatives: bool = option(
        False, changes="training", needs=having("negatives", "uniform", why="only these are drawn per position")
    )
    """uniform: draw one set of negatives for the whole global batch instead of one set per position."""
    logq_correction: bool = option(
        False,
        changes="training",
        needs=not_having("negatives", "full", why="the whole corpus is not a sample of it"),
    )
    """Subtract log Q from the logit of each negative, where Q is how often the item is expected among the negatives:
    the sampled softmax then estimates the softmax over the whole corpus. The target is always there, so its logit stays
    (Bengio and Senécal, 2003). On MovieLens no kind gained from it."""
    mask_seen: bool = option(False, changes="training")
    """Training: no negatives of a position are items that the user has seen up to it, those before the sequence begins
    included, of whatever kind the negatives are; filter_seen excludes the same items from evaluation. A step needs 8
    bytes of memory for each sequence and each item of the pool of negatives."""
    later_target_weights: list[float] = option([], changes="training", above=0, maximum=1)
    """Training: weights of the second, third, … item after a position as targets beside the next one, whose weight is
    1, such as [0.5, 0.25]: the loss is the cross entropy to all of them. Empty: the next item alone."""
    item_tower: bool = option(False, changes="tensors", needs=replace(STORED_DATA, strict=True))
    """Make the vector of an item from its id and the features of DatasetArgs.side_feature_names that belong to
    items: the row of the id plus an MLP of the rows of the features. An item that is new, or was never trained on, gets
    its vector from its features alone. False: the vector is the row of the id."""
    filter_seen: bool = option(True, changes="reports")
    """Leave out the items that the user has seen: from evaluation, where a held-out item that the user had before is a
    miss, and from what predict, recommend, the Python interface, an export and the server answer unless asked
    otherwise. False, such as for repeat purchases: these items compete as all others."""
    eval_metrics: tuple[str, ...] = _metrics(("HR@10", "NDCG@10"), ("HR@K", "NDCG@K", "MRR@K", "MRR"))
    """Metrics, with any K."""

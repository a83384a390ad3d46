"""What the outputs of a ranking model say, as named columns of numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hstu.config.args import DatasetArgs
from hstu.config.run_config import RunConfig
from hstu.data.store import SequenceStore
from hstu.model.tasks import RankingTask
from hstu.train.builder import task_names
from hstu.train.evaluate import Evaluator, RankingEvaluator
from hstu.train.evaluate_tasks import MultiTaskEvaluator
from hstu.train.task_metrics import sigmoid

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class ScoreColumns:
    """Turns outputs float32 [n, width] into columns float32 [n]."""

    width: int
    first_action: int
    """An action that the model has a class for."""
    convert: Callable[[np.ndarray], Columns]

    def of(self, outputs: np.ndarray) -> Columns:
        """The columns of these outputs."""
        return {name: values.astype(np.float32) for name, values in self.convert(outputs.astype(np.float64)).items()}


def score_columns(evaluator: Evaluator, config: RunConfig, store: SequenceStore) -> ScoreColumns:
    """The columns of a ranking model.

    - One binary task: ``score``, the probability of a positive action; of several, ``score_<name>`` each.
    - Classes: ``p_<action>``, the probability of each, and ``score``, the expected action.
    - RankingArgs.tasks: binary ``score_<task>``, a probability; class ``p_<task>_<label>``; ordinal ``score_<task>``,
      the expected label; regression and censored ``score_<task>``, the value.
    """
    if isinstance(evaluator, MultiTaskEvaluator):
        tasks = evaluator.tasks
        widths = [task.num_predictions for task in tasks]

        def of_tasks(outputs: np.ndarray) -> Columns:
            parts = np.split(outputs, np.cumsum(widths)[:-1], axis=1)
            return {
                name: each for task, own in zip(tasks, parts, strict=True) for name, each in _task(task, own).items()
            }

        return ScoreColumns(sum(widths), 0, of_tasks)
    assert isinstance(evaluator, RankingEvaluator)
    if evaluator.num_tasks is not None:
        names = _names_of_bits(evaluator.num_tasks, config)
        return ScoreColumns(len(names), 0, lambda outputs: dict(zip(names, sigmoid(outputs).T, strict=True)))
    first = evaluator.label_offset
    last = config.task_args.prediction_head_arch[-1]  # type: ignore[union-attr]
    labels = range(first, first + last)
    return ScoreColumns(last, first, lambda outputs: _classes(outputs, "p_", labels, "score"))


def _names_of_bits(count: int, config: RunConfig) -> list[str]:
    if count == 1:
        return ["score"]
    assert isinstance(config.dataset, DatasetArgs)
    named = task_names(config.dataset.dataset_name)
    return [f"score_{name}" for name in (named if len(named) == count else [f"task{bit}" for bit in range(count)])]


def _task(task: RankingTask, outputs: np.ndarray) -> Columns:
    name, kind = task.args.task_name, task.args.kind
    if kind == "class":
        labels = range(task.first_class, task.first_class + outputs.shape[1])
        return _classes(outputs, f"p_{name}_", labels)
    if kind == "binary":
        return {f"score_{name}": sigmoid(outputs[:, 0])}
    if kind == "ordinal":
        return {f"score_{name}": task.first_class + sigmoid(outputs).sum(axis=1)}
    return {f"score_{name}": outputs[:, 0]}


def _classes(outputs: np.ndarray, prefix: str, labels: Sequence[int], expected: str | None = None) -> Columns:
    """The probability of each class and, if ``expected`` names a column, the expected label."""
    probabilities = np.exp(outputs - np.logaddexp.reduce(outputs, axis=1, keepdims=True))
    columns = {f"{prefix}{label}": column for label, column in zip(labels, probabilities.T, strict=True)}
    return columns if expected is None else {expected: probabilities @ np.array(labels), **columns}

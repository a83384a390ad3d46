"""What the outputs of a ranking model say, as named columns of numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hstu.config.args import DatasetArgs
from hstu.config.run_config import RunConfig
from hstu.model.tasks import RankingTask
from hstu.train.builder import task_names
from hstu.train.evaluate import Evaluator, MultiTaskEvaluator, RankingEvaluator
from hstu.train.store_source import StoreSource
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


def score_columns(evaluator: Evaluator, config: RunConfig, source: StoreSource) -> ScoreColumns:
    """The columns of a ranking model.

    - One binary task: ``score``, the probability of a positive action; of several, ``score_<name>`` each.
    - Classes: ``p_<action>``, the probability of each, and ``score``, the expected action, unless actions are texts.
    - RankingArgs.tasks: binary ``score_<task>``, a probability; class ``p_<task>_<label>``; ordinal ``score_<task>``,
      the expected label; regression ``score_<task>``, the value.
    """
    if isinstance(evaluator, MultiTaskEvaluator):
        tasks = evaluator.tasks
        widths = [task.num_predictions for task in tasks]

        def of_tasks(outputs: np.ndarray) -> Columns:
            parts = np.split(outputs, np.cumsum(widths)[:-1], axis=1)
            columns: Columns = {}
            for task, own in zip(tasks, parts, strict=True):
                columns |= _task(task, own, source.label_facts[task.args.label].texts)
            return columns

        return ScoreColumns(sum(widths), 0, of_tasks)
    assert isinstance(evaluator, RankingEvaluator)
    if evaluator.num_tasks is not None:
        names = _names_of_bits(evaluator.num_tasks, config)
        return ScoreColumns(len(names), 0, lambda outputs: dict(zip(names, sigmoid(outputs).T, strict=True)))
    first, last = evaluator.label_offset, config.task_args.prediction_head_arch[-1]  # type: ignore[union-attr]
    action = source.roles.action
    assert action is not None, "a ranking model has actions"
    texts = source.store.raw_ids(action).tolist() if source.store.feature(action).has_vocab else []
    return ScoreColumns(last, first, lambda outputs: _classes(outputs, "p_", first, texts, None if texts else "score"))


def _names_of_bits(count: int, config: RunConfig) -> list[str]:
    if count == 1:
        return ["score"]
    assert isinstance(config.dataset, DatasetArgs)
    named = task_names(config.dataset.dataset_name)
    return [f"score_{name}" for name in (named if len(named) == count else [f"task{bit}" for bit in range(count)])]


def _task(task: RankingTask, outputs: np.ndarray, texts: Sequence[str]) -> Columns:
    """``texts``: what the labels 0, 1, … stand for; empty if they are numbers."""
    name, kind = task.args.task_name, task.args.kind
    if kind == "class":
        return _classes(outputs, f"p_{name}_", task.first_class, texts)
    if kind == "binary":
        return {f"score_{name}": sigmoid(outputs[:, 0])}
    if kind == "ordinal":
        return {f"score_{name}": task.first_class + sigmoid(outputs).sum(axis=1)}
    return {f"score_{name}": outputs[:, 0]}


def _classes(
    outputs: np.ndarray, prefix: str, first: int, texts: Sequence[str] = (), expected: str | None = None
) -> Columns:
    """The probability of each class, from the label ``first`` on; the expected label if ``expected`` is its column."""
    probabilities = np.exp(outputs - np.logaddexp.reduce(outputs, axis=1, keepdims=True))
    labels = range(first, first + outputs.shape[1])
    names = [texts[label] if label < len(texts) else label for label in labels]
    columns = {f"{prefix}{name}": column for name, column in zip(names, probabilities.T, strict=True)}
    return columns if expected is None else {expected: probabilities @ np.array(labels), **columns}

"""What the outputs of a model mean: one table for files of predictions, exports, the server and sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from hstu.config.args import RankingArgs
from hstu.model.ranking import RankingDense
from hstu.model.retrieval import RetrievalDense
from hstu.model.tasks import MultiTaskDense
from hstu.serve.loaded import LoadedModel
from hstu.serve.runtime.model import columns_of as columns_of_tasks
from hstu.train.builder import task_names
from hstu.train.inference import StoredSource


@dataclass(frozen=True)
class Prediction:
    """Consecutive outputs of a model that predict one property of an item."""

    name: str
    """The name in serving.json."""
    kind: str
    """ "binary": a logit; "class": one logit per label; "number": the value itself."""
    columns: Sequence[str]
    """The name of each output."""
    first: int = 0
    """The label of the first output, if the kind is "class"."""
    expected: str | None = None
    """The column of the expected label, if there is one."""


def predictions_of(loaded: LoadedModel) -> list[Prediction]:
    """The predictions of a model, in the order of its outputs.

    Columns of ranking:
    - One binary task: ``score``, the probability of a positive action. Several: ``score_<name>`` each.
    - Classes: ``p_<action>``, a probability each, and ``score``, the expected action, unless actions are texts.
    - RankingArgs.tasks: ``score_<task>`` (binary: probability, regression: value), ``p_<task>_<label>`` (class).
    """
    task, source, config = loaded.task, loaded.source, loaded.config
    if isinstance(task, RetrievalDense):
        return [Prediction("cosine", "number", ["score"])]
    if isinstance(task, MultiTaskDense):
        found = []
        for each in task.each_task:
            name, kind, facts = each.args.task_name, each.args.kind, source.label_facts.get(each.args.label)
            labels = _labels(each.first_class, each.args.output_width, facts.texts if facts else ())
            columns = [f"p_{name}_{label}" for label in labels] if kind == "class" else [f"score_{name}"]
            found.append(Prediction(name, "number" if kind == "regression" else kind, columns, each.first_class))
        return found
    assert isinstance(task, RankingDense) and isinstance(config.task_args, RankingArgs)
    if task.is_multi_task:
        bits = [f"task{bit}" for bit in range(task.num_tasks)]
        named = task_names(loaded.dataset.dataset_name)
        columns = [f"score_{name}" for name in (named if len(named) == len(bits) else bits)]
        if len(bits) == 1:
            columns = ["score"]
        return [Prediction(bit, "binary", [column]) for bit, column in zip(bits, columns, strict=True)]
    action, texts, first = source.roles.action, [], task.label_offset
    assert action is not None, "a ranking model has actions"
    if not isinstance(source, StoredSource) and source.store.feature(action).has_vocab:
        texts = source.store.raw_ids(action).tolist()
    columns = [f"p_{label}" for label in _labels(first, config.task_args.prediction_head_arch[-1], texts)]
    return [Prediction(action, "class", columns, first, expected=None if texts else "score")]


def columns_of(loaded: LoadedModel, outputs: np.ndarray) -> dict[str, np.ndarray]:
    """Convert outputs of a model, float32 [n, width], to column name → float32 [n], as an export does."""
    columns = columns_of_tasks([asdict(each) for each in predictions_of(loaded)], torch.from_numpy(outputs))
    return {name: values.numpy() for name, values in columns.items()}


def _labels(first: int, count: int, texts: Sequence[str]) -> list[Any]:
    """Names of ``count`` classes from label ``first`` on. ``texts``: names of the labels 0, 1, …; may be shorter."""
    return [texts[label] if label < len(texts) else label for label in range(first, first + count)]

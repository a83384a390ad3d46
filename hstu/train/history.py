"""Metrics and losses of a run so far. Checkpoints contain them, so that a resumed run goes on from them."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from hstu.observe.records import EvalRecord, to_line

LOWER_IS_BETTER = ("LOGLOSS", "NE")


def is_better(name: str, value: float, than: float) -> bool:
    """Whether ``value`` of the metric ``name`` (which may have a suffix, as in ``NE/task0``) beats ``than``."""
    return _beats(value, than, name.split("/")[0] in LOWER_IS_BETTER)


def _beats(value: float, than: float, lower: bool) -> bool:
    if math.isnan(than) or math.isnan(value):
        return math.isnan(than) and not math.isnan(value)
    return value < than if lower else value > than


class MetricsHistory:
    """All evaluations of a run, with the last and best value of each metric per split."""

    def __init__(self) -> None:
        self.last: dict[str, dict[str, float]] = {}
        """split → metric → value of the last evaluation."""
        self.best: dict[str, dict[str, dict[str, Any]]] = {}
        """split → metric → {"value", "iter"} of the best evaluation by this metric."""
        self.evaluations: dict[tuple[str, int], EvalRecord] = {}
        """(split, iteration) → its last evaluation, in the order of the first ones."""

    def add(self, record: EvalRecord) -> None:
        """Add one evaluation."""
        self.evaluations[record.split, record.iteration] = record
        self.last[record.split] = dict(record.metrics)
        best = self.best.setdefault(record.split, {})
        for name, value in record.metrics.items():
            if name not in best or is_better(name, value, best[name]["value"]):
                best[name] = {"value": value, "iter": record.iteration}

    def has(self, split: str, iteration: int) -> bool:
        """Whether a split has been evaluated at an iteration."""
        return (split, iteration) in self.evaluations

    def state_dict(self) -> Any:
        """All evaluations as JSON: a list of records, the form in which checkpoints have always held them."""
        return json.loads(to_line([one.as_json() for one in self.evaluations.values()]))

    def load_state_dict(self, state_dict: Any) -> None:
        """Add the evaluations of ``state_dict()``."""
        for record in state_dict:
            self.add(EvalRecord.from_json(record))


class Selection:
    """The best value of one metric on one split, and the number of evaluations since that have not improved it.

    ``metric``: None for no selection. ``mode``: "max" or "min". ``patience``: None for no early stopping.
    """

    def __init__(self, metric: str | None, mode: str, split: str, patience: int | None) -> None:
        self.metric = metric
        self.split = split
        self._lower = mode == "min"
        self._patience = patience
        self.value = math.nan
        self.iteration: int | None = None
        """Iteration of the best value; None as long as there is none."""
        self.without_improvement = 0

    def follow(self, history: MetricsHistory) -> bool:
        """Update from all evaluations of ``history``. Returns whether the last one of the split is the best."""
        self.value, self.iteration, self.without_improvement = math.nan, None, 0
        records = [one for one in history.evaluations.values() if one.split == self.split and self.metric is not None]
        for record in records:
            value = record.metrics.get(self.metric or "", math.nan)
            if _beats(value, self.value, self._lower):
                self.value, self.iteration, self.without_improvement = value, record.iteration, 0
            else:
                self.without_improvement += 1
        return bool(records) and records[-1].iteration == self.iteration

    @property
    def is_exhausted(self) -> bool:
        """Whether patience is used up, so that training ends."""
        return self._patience is not None and self.without_improvement >= self._patience

    def as_json(self) -> dict[str, Any]:
        """For summary.json."""
        return {"metric": self.metric, "split": self.split, "value": self.value, "iter": self.iteration}


class RunningLoss:
    """The mean loss since the last record. Only ``pop`` and ``state_dict`` wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self.steps = 0

    def add(self, loss: Tensor) -> None:
        """Add the loss of one step, a scalar on the device."""
        self._sum += loss
        self.steps += 1

    def pop(self) -> float:
        """Return the mean and start a new one."""
        mean = float(self._sum) / self.steps
        self._sum.zero_()
        self.steps = 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """The sum of the losses and the number of steps, as JSON."""
        return {"sum": float(self._sum), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore ``state_dict()``."""
        self._sum.fill_(state_dict["sum"])
        self.steps = state_dict["steps"]

"""What a run has measured so far. It is part of the checkpoints, so that a resumed run knows it wherever it writes."""

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
    """Collects evaluations, split by split."""

    def __init__(self) -> None:
        self.last: dict[str, dict[str, float]] = {}
        """split → metric → value of the last evaluation."""
        self.best: dict[str, dict[str, dict[str, Any]]] = {}
        """split → metric → {"value", "iter"} of the best evaluation, each metric by itself."""
        self.evaluations: dict[tuple[str, int], EvalRecord] = {}
        """(split, iteration) → its last evaluation, in the order in which they were first made."""

    def add(self, record: EvalRecord) -> None:
        """Take note of one evaluation."""
        self.evaluations[record.split, record.iteration] = record
        self.last[record.split] = dict(record.metrics)
        best = self.best.setdefault(record.split, {})
        for name, value in record.metrics.items():
            if name not in best or is_better(name, value, best[name]["value"]):
                best[name] = {"value": value, "iter": record.iteration}

    def has(self, split: str, iteration: int) -> bool:
        """Whether a split has been evaluated at an iteration."""
        return (split, iteration) in self.evaluations

    def state(self) -> list[dict[str, Any]]:
        """All evaluations, as JSON."""
        records: list[dict[str, Any]] = json.loads(to_line([one.as_json() for one in self.evaluations.values()]))
        return records

    def load_state(self, state: list[dict[str, Any]]) -> None:
        """Take note of the evaluations of ``state``."""
        for record in state:
            self.add(EvalRecord.from_json(record))


class Selection:
    """Follows one metric on one split: its best value, and how many evaluations since have not beaten it.

    ``metric``: None follows nothing. ``mode``: "max" or "min". ``patience``: None is endless.
    """

    def __init__(self, metric: str | None, mode: str, split: str, patience: int | None) -> None:
        self.metric = metric
        self.split = split
        self._lower = mode == "min"
        self._patience = patience
        self.value = math.nan
        self.iteration: int | None = None
        """Of the best value; None as long as there is none."""
        self.without_improvement = 0

    def follow(self, history: MetricsHistory) -> bool:
        """Look at all evaluations of ``history``; True where the last one of the split is the best."""
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
        """Whether training is to end."""
        return self._patience is not None and self.without_improvement >= self._patience

    def as_json(self) -> dict[str, Any]:
        """For summary.json."""
        return {"metric": self.metric, "split": self.split, "value": self.value, "iter": self.iteration}


class RunningLoss:
    """The mean loss since the last record. Nothing waits for the device before ``take`` or ``state``."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self.steps = 0

    def add(self, loss: Tensor) -> None:
        """One more step; ``loss``: scalar on the device."""
        self._sum += loss
        self.steps += 1

    def take(self) -> float:
        """The mean, which begins anew."""
        mean = float(self._sum) / self.steps
        self._sum.zero_()
        self.steps = 0
        return mean

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {"sum": float(self._sum), "steps": self.steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore ``state``."""
        self._sum.fill_(state["sum"])
        self.steps = state["steps"]

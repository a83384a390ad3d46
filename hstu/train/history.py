"""Metrics and losses of a run so far. Checkpoints contain them, so that a resumed run continues them."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hstu.config.args.task import LOWER_IS_BETTER
from hstu.observe.records import EvalRecord, plain


class MetricsHistory:
    """The last evaluation of each split and the best of each metric. Its size does not grow with the run."""

    def __init__(self) -> None:
        self._last: dict[str, EvalRecord] = {}
        self._count: dict[str, int] = {}
        """split → number of evaluations."""
        self._extremes: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
        """split → metric → "max" or "min" → {"value" (None: undefined), "iter", "number"} of the first with it."""

    @property
    def last(self) -> dict[str, dict[str, float]]:
        """split → metric → value of the last evaluation."""
        return {split: dict(record.metrics) for split, record in self._last.items()}

    @property
    def best(self) -> dict[str, dict[str, dict[str, Any]]]:
        """split → metric → {"value", "iter"} of the best evaluation by this metric."""
        best: dict[str, dict[str, dict[str, Any]]] = {split: {} for split in self._extremes}
        for split, extremes in self._extremes.items():
            for name, found in extremes.items():
                extreme = found["min" if name.split("/")[0] in LOWER_IS_BETTER else "max"]
                best[split][name] = {"value": extreme["value"], "iter": extreme["iter"]}
        return best

    def add(self, record: EvalRecord) -> None:
        """Add one evaluation. Repeating an iteration changes only ``last``."""
        split, repeated = record.split, self.has(record.split, record.iteration)
        self._last[split] = record
        if repeated:
            return
        self._count[split] = self._count.get(split, 0) + 1
        extremes = self._extremes.setdefault(split, {})
        for name, value in record.metrics.items():
            found = extremes.setdefault(name, {})
            known = None if math.isnan(value) else value
            for mode, beats in (("max", operator.gt), ("min", operator.lt)):
                best = found.get(mode, {}).get("value")
                if mode not in found or (known is not None and (best is None or beats(known, best))):
                    found[mode] = {"value": known, "iter": record.iteration, "number": self._count[split]}

    def has(self, split: str, iteration: int) -> bool:
        """Whether the last evaluation of the split was at this iteration."""
        return split in self._last and self._last[split].iteration == iteration

    def find_best(self, split: str, metric: str, mode: str) -> tuple[float, int | None, int]:
        """(best value, its iteration, evaluations since), or (nan, None, all evaluations). mode: "max" or "min"."""
        count = self._count.get(split, 0)
        found = self._extremes.get(split, {}).get(metric, {}).get(mode)
        if found is None or found["value"] is None:
            return math.nan, None, count
        return found["value"], found["iter"], count - found["number"]

    def state_dict(self) -> Any:
        """The state as JSON."""
        last = [record.as_json() for record in self._last.values()]
        return plain({"last": last, "count": self._count, "extremes": self._extremes})

    def load_state_dict(self, state_dict: Any) -> None:
        """Restore ``state_dict()``."""
        records = [EvalRecord.from_json(record) for record in state_dict["last"]]
        self._last, self._count = {record.split: record for record in records}, state_dict["count"]
        self._extremes = state_dict["extremes"]


@dataclass
class Selection:
    """The best value of one metric (None: no selection) on one split. ``patience``: None for no early stopping."""

    metric: str | None
    mode: str
    split: str
    patience: int | None
    value: float = math.nan
    iteration: int | None = None
    """Iteration of the best value; None before the first."""
    without_improvement: int = 0

    def follow(self, history: MetricsHistory) -> bool:
        """Update from ``history``. Returns whether the split's last evaluation is the best."""
        if self.metric is None:
            return False
        self.value, self.iteration, self.without_improvement = history.find_best(self.split, self.metric, self.mode)
        return self.iteration is not None and self.without_improvement == 0

    @property
    def is_exhausted(self) -> bool:
        """Whether patience is used up, which ends training."""
        return self.patience is not None and self.without_improvement >= self.patience


class RunningLoss:
    """The mean loss since the last record, and its parts. Only ``pop`` and ``state_dict`` wait for the device."""

    def __init__(self, device: torch.device, tasks: Sequence[str] = ()) -> None:
        self._tasks = tasks
        self._sums = torch.zeros(1 + len(tasks), dtype=torch.float64, device=device)
        self.steps = 0

    def add(self, losses: Tensor) -> None:
        """Add ``StepResult.losses`` of one step."""
        self._sums += losses
        self.steps += 1

    def pop(self) -> tuple[float, dict[str, float]]:
        """Return the mean and its part by task, and reset them."""
        mean, *parts = [total / self.steps for total in self._sums.tolist()]
        self._sums.zero_()
        self.steps = 0
        return mean, dict(zip(self._tasks, parts, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON."""
        total, *parts = self._sums.tolist()
        return {"sum": total, "tasks": dict(zip(self._tasks, parts, strict=True)), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore ``state_dict()``. The part of a task that it lacks becomes nan until the next record."""
        self.steps, parts = state_dict["steps"], state_dict.get("tasks", {})
        unknown = math.nan if self.steps else 0.0
        totals = [state_dict["sum"], *(parts.get(name, unknown) for name in self._tasks)]
        self._sums.copy_(torch.tensor(totals, dtype=torch.float64))

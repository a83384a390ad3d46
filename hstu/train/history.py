"""The last and the best value of each metric, for summary.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hstu.observe.records import EvalRecord, read_metrics

LOWER_IS_BETTER = ("LOGLOSS", "NE")


def is_better(name: str, value: float, than: float) -> bool:
    """Whether ``value`` of the metric ``name`` (which may have a suffix, as in ``NE/task0``) beats ``than``."""
    if math.isnan(than) or math.isnan(value):
        return math.isnan(than) and not math.isnan(value)
    return value < than if name.split("/")[0] in LOWER_IS_BETTER else value > than


class MetricsHistory:
    """Collects evaluations, split by split."""

    def __init__(self) -> None:
        self.last: dict[str, dict[str, float]] = {}
        """split → metric → value of the last evaluation."""
        self.best: dict[str, dict[str, dict[str, Any]]] = {}
        """split → metric → {"value", "iter"} of the best evaluation, each metric by itself."""

    def read(self, metrics_file: Path, iteration: int) -> None:
        """Take note of the evaluations up to ``iteration`` that an earlier attempt of a resumed run has recorded."""
        for record in read_metrics(metrics_file):
            if record["kind"] == "eval" and record["iter"] <= iteration:
                metrics = {name: math.nan if value is None else value for name, value in record["metrics"].items()}
                self.add(
                    EvalRecord(iteration=record["iter"], epoch=record["epoch"], split=record["split"], metrics=metrics)
                )

    def add(self, record: EvalRecord) -> None:
        """Take note of one evaluation."""
        self.last[record.split] = dict(record.metrics)
        best = self.best.setdefault(record.split, {})
        for name, value in record.metrics.items():
            if name not in best or is_better(name, value, best[name]["value"]):
                best[name] = {"value": value, "iter": record.iteration}

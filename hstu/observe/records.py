"""The lines of metrics.jsonl: what is written, and how it is read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional


@dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """What training did since the record before.

    loss: mean over the labelled tokens. samples_per_s, tokens_per_s: of all ranks together. tflops: per rank.
    mfu, data_wait: shares in [0, 1]; mfu is nan where the peak is unknown. memory_bytes: of this rank. time_s:
    seconds since the run began. loss_scale: that of the next step; skipped_steps: those whose gradients overflowed;
    both None, and not written, where the loss is not scaled. tables: what became of the ids of dynamic tables, a report
    a table.
    """

    iteration: int
    epoch: float
    loss: float
    lr: float
    samples_per_s: float
    tokens_per_s: float
    tflops: float
    mfu: float
    data_wait: float
    memory_bytes: int
    time_s: float
    loss_scale: Optional[float] = None
    skipped_steps: Optional[int] = None
    tables: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The object that metrics.jsonl gets."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if not self.tables:
            del fields["tables"]
        if self.loss_scale is None:
            del fields["loss_scale"], fields["skipped_steps"]
        return {"kind": "train", "iter": fields.pop("iteration"), **fields}

    def scalars(self) -> dict[str, float]:
        """Numbers to draw over iterations, by name."""
        others = ("kind", "iter", "time_s", "tables")
        values = {f"train/{name}": value for name, value in self.as_json().items() if name not in others}
        for table, report in self.tables.items():
            values |= {f"tables/{table}/{name}": value for name, value in report.items()}
        return values


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """The metrics of one evaluation; ``split`` is "valid" or "test"."""

    iteration: int
    epoch: float
    split: str
    metrics: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """The object that metrics.jsonl gets."""
        return {
            "kind": "eval",
            "iter": self.iteration,
            "epoch": self.epoch,
            "split": self.split,
            "metrics": dict(self.metrics),
        }

    def scalars(self) -> dict[str, float]:
        """Numbers to draw over iterations, by name."""
        return {f"{self.split}/{name}": value for name, value in self.metrics.items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> EvalRecord:
        """What ``as_json`` gave, also after it has been a line."""
        metrics = {name: math.nan if value is None else value for name, value in record["metrics"].items()}
        return cls(iteration=record["iter"], epoch=record["epoch"], split=record["split"], metrics=metrics)


def to_line(record: Any) -> str:
    """Strict JSON on one line, floats in full precision. nan and infinities, which JSON has not, become null."""
    return json.dumps(_plain(record), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) or type(value).__module__ == "numpy":
        number = value if isinstance(value, float) else value.item()
        return number if not isinstance(number, float) or math.isfinite(number) else None
    return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl that still hold, in order.

    A line that a kill cut off is skipped. After a "resumed" line the run goes on from an earlier iteration: what the
    cut-off attempt had written at or after the first iteration recorded since then was done again, and is dropped.
    """
    attempts: list[list[dict[str, Any]]] = [[]]
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict):
            continue
        if record.get("kind") == "resumed":
            attempts.append([])
        elif "iter" in record:
            attempts[-1].append(record)
    kept: list[dict[str, Any]] = []
    for attempt in attempts:
        first = min((record["iter"] for record in attempt), default=math.inf)
        kept = [record for record in kept if record["iter"] < first] + attempt
    return kept

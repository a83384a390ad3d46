"""The records of metrics.jsonl: their fields, writing and reading."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Self

from hstu.base.json_shape import check_shape

_SHAPES: dict[str, Any] = {
    "train": {"iter": int, "epoch?": float, "loss": float | None},
    "eval": {"iter": int, "epoch?": float, "split": str, "metrics": {str: float | None}},
    "resumed": {},
}
"""Kind of a line → entries that readers need."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Rates over all ranks since the previous record, unless a field says otherwise."""

    step_s: float = math.nan
    """Seconds per step. Not in metrics.jsonl."""
    samples_per_s: float
    tokens_per_s: float
    tflops: float
    """Mean TFLOPS per rank."""
    mfu: float
    """Share of the peak in [0, 1]; nan if the peak is unknown or was measured too low, on a busy machine."""
    data_wait: float
    """Share of the time spent waiting for data, in [0, 1], averaged over ranks."""
    ranks: Mapping[str, float] = field(default_factory=dict)
    """Seconds per step by rank, see ``throughput.rank_times``. Empty for a single rank."""


@dataclass(frozen=True, kw_only=True)
class TrainRecord(Throughput):
    """Averages and rates of training since the previous record."""

    iteration: int
    epoch: float
    loss: float
    """Mean over the labelled tokens."""
    lr: float
    lr_tables: Optional[float] = None
    """Of sharded tables without a rate of their own. What is None is not in the file."""
    lr_parts: Mapping[str, float] = field(default_factory=dict)
    """PartOptimizerArgs.regex → learning rate, written as "lr/<regex>"."""
    grad_norm: Optional[float] = None
    """Of this step, see ``StepResult.grad_norms``, like the next."""
    grad_norm_tables: Optional[float] = None
    memory_bytes: int
    """On this rank."""
    time_s: float
    """Seconds since the run began."""
    loss_scale: Optional[float] = None
    """For the next step. None if the loss is not scaled."""
    skipped_steps: Optional[int] = None
    """Steps that were skipped because their gradients overflowed. None if the loss is not scaled."""
    tables: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Dynamic table → its id counts by name."""
    task_losses: Mapping[str, float] = field(default_factory=dict)
    """Task → its part of ``loss``, written as "loss/<task>". Empty if there is one task."""

    def as_json(self) -> dict[str, Any]:
        """The object written to metrics.jsonl."""
        fields = {name: value for name, value in vars(self).items() if value is not None}
        del fields["step_s"]
        if not self.tables:
            del fields["tables"]
        losses = {f"loss/{task}": loss for task, loss in fields.pop("task_losses").items()}
        losses |= {f"lr/{part}": rate for part, rate in fields.pop("lr_parts").items()}
        first = {name: fields.pop(name) for name in ("epoch", "loss", "lr")}
        return {"kind": "train", "iter": fields.pop("iteration"), **fields.pop("ranks"), **first, **fields, **losses}

    def scalars(self) -> dict[str, float]:
        """Numbers to plot over iterations, by name."""
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
        """The object written to metrics.jsonl."""
        fields = dict(vars(self))
        return {"kind": "eval", "iter": fields.pop("iteration"), **fields}

    def scalars(self) -> dict[str, float]:
        """Numbers to plot over iterations, by name."""
        return {f"{self.split}/{name}": value for name, value in self.metrics.items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of ``as_json``; also accepts a record read from a file."""
        metrics = {name: math.nan if value is None else value for name, value in record["metrics"].items()}
        return cls(iteration=record["iter"], epoch=record["epoch"], split=record["split"], metrics=metrics)


def to_line(record: Any) -> str:
    """Strict JSON on one line, with floats in full precision. nan and infinities, which JSON lacks, become null."""
    return json.dumps(plain(record), allow_nan=False)


def plain(record: Any) -> Any:
    """What ``to_line`` writes, as reading it gives it."""
    text = json.dumps(record, default=lambda value: dict(value) if isinstance(value, Mapping) else value.item())
    return json.loads(text, parse_constant=lambda _: None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the training and evaluation records of a metrics.jsonl, in order.

    Lines that are no records are skipped. A "resumed" line means that iterations repeat: their older records go. The
    best weights are evaluated after later iterations, so evaluations replace only those of their iteration.
    """
    attempts: list[list[dict[str, Any]]] = [[]]
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            check_shape(record, {"kind": str})
            check_shape(record, _SHAPES[record["kind"]])
        except (ValueError, KeyError, RecursionError):
            continue
        if record["kind"] == "resumed":
            attempts.append([])
        else:
            attempts[-1].append(record)
    kept: list[dict[str, Any]] = []
    for attempt in attempts:
        first = min((record["iter"] for record in attempt if record["kind"] == "train"), default=math.inf)
        again = {(record.get("split"), record["iter"]) for record in attempt}
        kept = [r for r in kept if r["iter"] < first and (r.get("split"), r["iter"]) not in again] + attempt
    return kept

"""The last and the best of each metric."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hstu.observe.records import EvalRecord, to_line
from hstu.train.history import MetricsHistory, is_better


def record(iteration: int, split: str = "valid", **metrics: float) -> EvalRecord:
    return EvalRecord(iteration=iteration, epoch=iteration / 10, split=split, metrics=metrics)


@pytest.mark.parametrize("name", ["LOGLOSS", "NE", "NE/task0"])
def test_losses_are_better_when_lower(name: str) -> None:
    assert is_better(name, 0.1, than=0.2) and not is_better(name, 0.2, than=0.1)


@pytest.mark.parametrize("name", ["AUC", "AUC>=4", "AUC/task1", "HR@10", "NDCG@10", "MRR", "ACC", "GAUC"])
def test_all_other_metrics_are_better_when_higher(name: str) -> None:
    assert is_better(name, 0.2, than=0.1) and not is_better(name, 0.1, than=0.2)


def test_an_equal_value_is_not_better_so_the_first_best_one_stays() -> None:
    assert not is_better("AUC", 0.5, than=0.5)


def test_any_number_beats_nan_and_nan_beats_nothing() -> None:
    assert is_better("AUC", 0.0, than=math.nan) and is_better("NE", 9.0, than=math.nan)
    assert not is_better("AUC", math.nan, than=0.0) and not is_better("AUC", math.nan, than=math.nan)


def test_each_metric_has_a_best_of_its_own_in_each_split() -> None:
    history = MetricsHistory()
    for entry in (
        record(10, AUC=0.6, LOGLOSS=0.5),
        record(20, AUC=0.7, LOGLOSS=0.6),
        record(20, "test", AUC=0.9),
        record(30, AUC=0.65, LOGLOSS=0.7),
    ):
        history.add(entry)
    assert history.last == {"valid": {"AUC": 0.65, "LOGLOSS": 0.7}, "test": {"AUC": 0.9}}
    assert history.best == {
        "valid": {"AUC": {"value": 0.7, "iter": 20}, "LOGLOSS": {"value": 0.5, "iter": 10}},
        "test": {"AUC": {"value": 0.9, "iter": 20}},
    }


def test_a_metric_that_was_undefined_first_gets_its_best_later() -> None:
    history = MetricsHistory()
    history.add(record(10, AUC=math.nan))
    history.add(record(20, AUC=0.4))
    assert history.best["valid"]["AUC"] == {"value": 0.4, "iter": 20}


def test_a_resumed_run_knows_what_was_evaluated_up_to_its_checkpoint(tmp_path: Path) -> None:
    before = [record(10, AUC=0.8, NE=math.nan), record(20, AUC=0.7, NE=0.9), record(30, AUC=0.99, NE=0.1)]
    lines = [to_line(entry.as_json()) for entry in before]
    lines.insert(1, json.dumps({"kind": "train", "iter": 15, "loss": 1.0}))
    lines.append(json.dumps({"kind": "resumed", "at": "now", "configuration_changed": False}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    history = MetricsHistory()
    history.read(tmp_path / "metrics.jsonl", iteration=20)
    assert history.best["valid"] == {"AUC": {"value": 0.8, "iter": 10}, "NE": {"value": 0.9, "iter": 20}}
    assert history.last["valid"] == {"AUC": 0.7, "NE": 0.9}

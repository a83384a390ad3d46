"""The last and the best of each metric."""

import json
import math

import pytest
import torch

from hstu.observe.records import EvalRecord
from hstu.train.history import MetricsHistory, RunningLoss, Selection


def record(iteration: int, split: str = "valid", **metrics: float) -> EvalRecord:
    return EvalRecord(iteration=iteration, epoch=iteration / 10, split=split, metrics=metrics)


@pytest.mark.parametrize(
    ("name", "best"),
    [
        *((name, 0.1) for name in ("LOGLOSS", "NE", "NE/task0")),
        *((name, 0.2) for name in ("AUC", "AUC>=4", "AUC/task1", "HR@10", "NDCG@10", "MRR", "ACC", "GAUC")),
    ],
)
def test_losses_are_better_when_lower_and_all_else_when_higher(name: str, best: float) -> None:
    history = MetricsHistory()
    for iteration, value in enumerate((0.2, 0.1, 0.2, 0.1), 1):
        history.add(record(iteration, "valid", **{name: value}))
    assert history.best["valid"][name] == {"value": best, "iter": 1 if best == 0.2 else 2}, "the first that reached it"


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


def test_what_a_checkpoint_keeps_does_not_grow_with_the_evaluations() -> None:
    history, sizes = MetricsHistory(), []
    for iteration in range(1000, 3000):
        history.add(record(iteration, AUC=0.5 + iteration / 10000, NE=0.25))
        sizes.append(len(json.dumps(history.state_dict())))
    assert max(sizes) < sizes[0] + 100  # more digits


def follow(values: list[float], mode: str = "max", patience: int | None = 2) -> tuple[list[bool], Selection]:
    """Whether each of the values, evaluated at 10, 20, …, was the best by then; and the selection in the end."""
    history, selection = MetricsHistory(), Selection("AUC", mode, "valid", patience)
    improved = []
    for iteration, value in enumerate(values, 1):
        history.add(record(10 * iteration, AUC=value))
        history.add(record(10 * iteration, "test", AUC=1.0))  # another split has no say
        improved.append(selection.follow(history))
    return improved, selection


def test_patience_counts_evaluations_in_a_row_that_do_not_beat_the_best() -> None:
    improved, selection = follow([0.5, 0.6, 0.6, 0.7, 0.6])
    assert improved == [True, True, False, True, False]
    assert (selection.value, selection.iteration, selection.without_improvement) == (0.7, 40, 1)
    assert not selection.is_exhausted
    assert follow([0.5, 0.6, 0.6, 0.7, 0.6, 0.5])[1].is_exhausted
    assert not follow([0.5, 0.4, 0.3, 0.2], patience=None)[1].is_exhausted


def test_the_mode_says_what_is_better_and_nan_never_is() -> None:
    assert follow([0.5, 0.6, 0.4], mode="min")[0] == [True, False, True]
    improved, selection = follow([math.nan, 0.5, math.nan])
    assert improved == [False, True, False]
    assert selection.iteration == 20
    assert follow([math.nan, math.nan])[1].is_exhausted, "a model that diverged from the start"


def test_the_running_mean_goes_on_in_another_process() -> None:
    before, after, older = (RunningLoss(torch.device("cpu"), ["click", "like"]) for _ in range(3))
    for loss in (1 / 3, 1e-9):
        before.add(torch.tensor([loss, 2 * loss / 3, loss / 3]))
    stored = json.loads(json.dumps(before.state_dict()))
    after.load_state_dict(stored)
    older.load_state_dict({"sum": stored["sum"], "steps": 2})
    for one in (before, after, older):
        one.add(torch.tensor([0.7, 0.4, 0.3]))
    mean, parts = before.pop()
    assert after.pop() == (mean, parts) and after.steps == 0 and sum(parts.values()) == pytest.approx(mean)
    assert older.state_dict()["sum"] / 3 == mean and all(math.isnan(part) for part in older.pop()[1].values())
    older.add(torch.tensor([0.75, 0.5, 0.25]))
    assert older.pop() == (0.75, {"click": 0.5, "like": 0.25}), "known from the first record on"

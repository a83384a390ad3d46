"""Tiny runs learn what there is to learn, with every kind of negatives."""

from typing import Any

import pytest

from tests.train.tiny import FinishedRun, Train

NEGATIVES: dict[str, dict[str, Any]] = {
    "in_batch": {},
    "in_batch, draws": {"num_negatives": 4},
    "uniform": {"negatives": "uniform", "num_negatives": 4},
    "uniform, shared": {"negatives": "uniform", "num_negatives": 6, "shared_negatives": True},
    "popularity, corrected": {"negatives": "popularity", "num_negatives": 4, "logq_correction": True},
    "mixed": {"negatives": "mixed", "num_negatives": 4},
    "full": {"negatives": "full"},
}


def learn(train: Train, task: str, **options: Any) -> FinishedRun:
    """50 iterations, with the metrics before and after them."""
    trainer = {"max_train_iters": 50, "eval_at_start": True, "eval_at_end": True, "eval_interval": 1000}
    return train(task, trainer=trainer, **options)


def test_actions_that_follow_from_items_are_learnt(train: Train) -> None:
    finished = learn(train, "ranking")
    assert finished.losses[-1] < 0.1 < 1.0 < finished.losses[0]
    before, after = (record["metrics"] for record in finished.records if record["kind"] == "eval")
    assert before["AUC"] < 0.7
    assert after["AUC"] > 0.95 and after["ACC"] > 0.9


@pytest.mark.parametrize("options", NEGATIVES.values(), ids=NEGATIVES)
def test_next_items_that_follow_from_items_are_learnt(train: Train, options: dict[str, Any]) -> None:
    finished = learn(train, "retrieval", task_args=options)
    assert finished.losses[-1] < 0.3 * finished.losses[0]
    before, after, test = (record["metrics"] for record in finished.records if record["kind"] == "eval")
    assert before["MRR"] < 0.6
    assert after["MRR"] > 0.85 and test["HR@3"] > 0.9

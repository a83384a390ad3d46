"""Every way to configure the network and the negatives trains; what must not change the mathematics does not."""

from typing import Any

import numpy as np
import pytest

from tests.conftest import MakeStore
from tests.train.tiny import FinishedRun, Train, walks

TASKS = ("ranking", "retrieval")


def falls(finished: FinishedRun) -> bool:
    return bool(np.mean(finished.losses[-3:]) < 0.9 * np.mean(finished.losses[:3]))


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("ranking", {"network": {"position_encoding": "none"}}),
        ("retrieval", {"network": {"position_encoding": "relative_bias", "item_embedding_dim": 8}}),
        ("ranking", {"network": {"item_embedding_dim": 6, "contextual_embedding_dim": 4}}),
        ("retrieval", {"network": {"hidden_dropout": 0.2, "input_dropout": 0.0}}),
        ("ranking", {"network": {"num_attention_heads": 1, "kv_channels": 4}}),
        ("ranking", {"network": {"target_group_size": 2}, "dataset": {"max_num_candidates": 3}}),
        ("ranking", {"network": {"interleave_actions": False}}),
        ("retrieval", {"network": {"interleave_actions": False}}),
        ("retrieval", {"dataset": {"action_feature_name": ""}}),
    ],
    ids=str,
)
def test_a_run_learns_and_is_evaluated(train: Train, task: str, options: dict[str, Any]) -> None:
    finished = train(task, trainer={"max_train_iters": 12, "eval_at_end": True}, **options)
    assert falls(finished)
    assert all(value is not None for value in finished.metrics.values())


def test_sequences_of_items_alone_are_retrieved(train: Train, make_store: MakeStore) -> None:
    store = make_store(walks()["items"])
    assert falls(train("retrieval", store=store, trainer={"max_train_iters": 12}))


def test_ranking_by_bits_has_a_metric_a_task(train: Train) -> None:
    bits = {"prediction_head_arch": [8, 2], "num_tasks": 2, "eval_metrics": ("AUC", "NE", "ACC")}
    finished = train("ranking", task_args=bits, trainer={"max_train_iters": 20, "eval_at_end": True})
    assert falls(finished)
    assert set(finished.metrics) == {"AUC", "AUC/task0", "AUC/task1", "NE", "ACC"}


NEGATIVES: dict[str, dict[str, Any]] = {
    "in_batch": {},
    "in_batch, draws": {"num_negatives": 4},
    "uniform": {"negatives": "uniform", "num_negatives": 4},
    "uniform, shared": {"negatives": "uniform", "num_negatives": 6, "shared_negatives": True},
    "mixed, corrected": {"negatives": "mixed", "num_negatives": 4, "logq_correction": True},
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

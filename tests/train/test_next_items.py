"""Ranking runs that also learn the next item, and what their checkpoints are for a run of either task."""

from collections.abc import Callable
from pathlib import Path

from tests.train.tiny import FinishedRun


def test_what_a_ranking_run_learns_about_next_items_begins_a_retrieval_run(
    train: Callable[..., FinishedRun], tmp_path: Path
) -> None:
    both = train(
        "ranking",
        trainer={"max_train_iters": 50, "eval_at_end": True, "ckpt_save_interval": 50},
        task_args={"next_item_weight": 1.0},
        next_item={"negatives": "uniform", "num_negatives": 4},
        output="both",
    )
    assert both.metrics["AUC"] > 0.95 and both.losses[-1] < 0.4 * both.losses[0]
    found = []
    for load in ({}, {"ckpt_load_dir": str(tmp_path / "both" / "checkpoints"), "ckpt_load_optimizer": False}):
        trainer = {"max_train_iters": 1, "eval_at_start": True, "eval_interval": 1000, "ckpt_load_strict": not load}
        found.append(train("retrieval", trainer=trainer | load).records[0]["metrics"]["MRR"])
    assert found[0] < 0.6 and found[1] > 0.8

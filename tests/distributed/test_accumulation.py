"""Micro-batches train what one batch of all their sequences trains: dense weights, tables of both kinds, negatives."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.conftest import write_small_store
from tests.distributed.launch import Launch, run_cases
from tests.distributed.training_cases import train
from tests.train.tiny import ITEM_FEATURES, OF_THE_ACTION, TOWER, walks

GLOBAL_BATCH, MICRO_BATCHES, ITERATIONS = 12, 3, 4
LIMITED = {"sparse_max_gradient": 0.002}
SGD = {"optimizer_str": "sgd", "learning_rate": 0.05}
ADAM = {"optimizer_str": "adam", "learning_rate": 0.01, "adam_eps": 1e-4}
ALL_SHARDED = ["item_id", "town", "action"]

CASES: dict[str, Any] = {
    "ranking, candidates": {
        "task": "ranking",
        "sharded": ALL_SHARDED,
        "dataset": {"max_num_candidates": 2},
        "optimizer": {"optimizer_str": "adagrad", "learning_rate": 0.01, "adam_eps": 1e-4},
        "network": {"contextual_embedding_dim": 8},
    },
    "tasks": {"task": "ranking", "optimizer": SGD, "dataset": {"max_num_candidates": 3}, "task_args": OF_THE_ACTION},
    "in_batch, draws, seen": {
        "task": "retrieval",
        "sharded": [],
        "optimizer": SGD | LIMITED,
        "dataset": {"max_sequence_length": 4},
        "task_args": {"num_negatives": 5, "mask_seen": True},
    },
    "mixed, logQ": {
        "task": "retrieval",
        "optimizer": ADAM | LIMITED,
        "network": {"position_encoding": "relative_bias"},
        "task_args": {"negatives": "mixed", "num_negatives": 5, "logq_correction": True},
    },
    "full": {
        "task": "retrieval",
        "optimizer": {"optimizer_str": "rowwise_adagrad", "learning_rate": 0.01, "adam_eps": 1e-4, **LIMITED},
        "task_args": {"negatives": "full"},
    },
    "in_batch, item tower": {
        **TOWER,
        "task": "retrieval",
        "sharded": ["item_id", "tags"],
        "optimizer": ADAM,
        "task_args": {"item_tower": True},
    },
}
PIPELINES = {name: ("none", "native", "prefetch")[number % 3] for number, name in enumerate(CASES)}
LAUNCHES = {"1 rank": Launch(1, 200), "2 ranks": Launch(2, 200)}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Launch → case, in one piece or in parts → what it learnt. 31 users: the last batch of an epoch is uneven."""
    place = tmp_path_factory.mktemp("accumulation")
    write_small_store(place / "store", **walks(31), item_features=ITEM_FEATURES)
    results = {}
    for name_of_launch, launch in LAUNCHES.items():
        cases = {}
        for name, options in CASES.items():
            for parts in (1, MICRO_BATCHES) if launch.ranks == 1 else (MICRO_BATCHES,):
                trainer = {
                    "train_batch_size": GLOBAL_BATCH // parts,
                    "gradient_accumulation_steps": parts,
                    "eval_batch_size": GLOBAL_BATCH,
                    "max_train_iters": ITERATIONS,
                    "max_grad_norm": 0.5,
                    "pipeline_type": PIPELINES[name],
                }
                output = str(place / name_of_launch / f"{name}, {parts}")
                cases[f"{name}, {parts}"] = partial(
                    train, store=str(place / "store"), output=output, **options, trainer=trainer
                )
        results[name_of_launch] = run_cases(launch, cases)[0]
    return results


def assert_close(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys() and left
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("name", CASES)
def test_micro_batches_train_as_the_whole_batch_does(launches: Any, name: str, launch: str) -> None:
    whole, parts = launches["1 rank"][f"{name}, 1"], launches[launch][f"{name}, {MICRO_BATCHES}"]
    assert len(parts["losses"]) == ITERATIONS
    assert parts["batches_per_epoch"] == whole["batches_per_epoch"] < ITERATIONS
    np.testing.assert_allclose(list(parts["losses"].values()), list(whole["losses"].values()), rtol=1e-5)
    assert_close(parts["tables"], whole["tables"])
    assert_close(parts["dense"], whole["dense"])


@pytest.mark.parametrize("name", CASES)
def test_what_is_compared_trains(launches: Any, name: str) -> None:
    losses = list(launches["1 rank"][f"{name}, 1"]["losses"].values())
    assert len(set(losses)) == ITERATIONS

from functools import partial
from typing import Any

import pytest

from tests.distributed.launch import Launch, run_cases
from tests.distributed.pipeline_cases import PIPELINES, STEPS, train, write_store
from tests.train.tiny import OF_THE_ACTION, TOWER

ADAM = {"optimizer_str": "adam"}
CASES: dict[str, Any] = {
    "ranking, sgd": {},
    "ranking, adam": {"optimizer": ADAM, "trainer": {"max_grad_norm": 0.05}},
    "two widths, adagrad": {"optimizer": {"optimizer_str": "adagrad"}, "network": {"contextual_embedding_dim": 8}},
    "all tables replicated": {"sharded": []},
    "ranking, tasks": {"dataset": {"max_num_candidates": 3}, "task_args": OF_THE_ACTION},
    "retrieval, in-batch negatives": {"task": "retrieval", "task_args": {"negatives": "in_batch"}},
    "retrieval, all items, seen": {
        "task": "retrieval",
        "dataset": {"max_sequence_length": 4},
        "task_args": {"negatives": "full", "mask_seen": True},
        "optimizer": ADAM,
    },
    "retrieval, item tower": {
        **TOWER,
        "task": "retrieval",
        "sharded": ("item_id", "tags"),
        "task_args": {"negatives": "full", "item_tower": True},
        "optimizer": ADAM,
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Per rank: "case, pipeline" → what ``train`` returns."""
    store = write_store(tmp_path_factory.mktemp("pipelines") / "store")
    cases = {
        f"{name}, {kind}": partial(train, store=store, pipeline_type=kind, **options)
        for name, options in CASES.items()
        for kind in PIPELINES
    }
    return run_cases(Launch(2, timeout_s=200), cases)


@pytest.mark.parametrize("kind", ["native", "prefetch"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_with_none_bit_for_bit(runs: Any, case: str, kind: str) -> None:
    for told in runs:
        assert told[f"{case}, {kind}"] == told[f"{case}, none"]


@pytest.mark.parametrize("case", CASES)
def test_the_epoch_ends_with_nothing_but_empty_sequences_on_one_rank(runs: Any, case: str) -> None:
    first, second = (told[f"{case}, none"] for told in runs)
    assert first["losses"] == second["losses"] and len(set(first["losses"])) == STEPS
    last_of_epoch = first["positions"].index([1, 8]) - 1
    assert {first["real"][last_of_epoch], second["real"][last_of_epoch]} == {0, 1}

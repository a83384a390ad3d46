from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.pipeline_cases import STEPS, write_store

HERE = "tests.distributed.pipeline_cases"
CASES: dict[str, dict[str, Any]] = {
    "ranking, sgd": {},
    "ranking, adam": {"optimizer": "adam", "lines": ["TrainerArgs.max_grad_norm = 0.05"]},
    "two widths, adagrad": {"optimizer": "adagrad", "lines": ["NetworkArgs.contextual_embedding_dim = 8"]},
    "all tables replicated": {"sharded": []},
    "retrieval, in-batch negatives": {"task": "retrieval", "lines": ["RetrievalArgs.negatives = 'in_batch'"]},
    "retrieval, all items": {"task": "retrieval", "lines": ["RetrievalArgs.negatives = 'full'"], "optimizer": "adam"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each rank's: case → pipeline → what it told."""
    store = tmp_path_factory.mktemp("pipelines") / "store"
    write_store(store)
    return run_ranks(f"{HERE}:train_cases", 2, timeout_s=200, store=str(store), cases=CASES)


@pytest.mark.parametrize("kind", ["native", "prefetch"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_with_none_bit_for_bit(runs: Any, case: str, kind: str) -> None:
    for told in runs:
        assert told[case][kind] == told[case]["none"]


@pytest.mark.parametrize("case", CASES)
def test_the_epoch_ends_with_nothing_but_empty_sequences_on_one_rank(runs: Any, case: str) -> None:
    first, second = (told[case]["none"] for told in runs)
    assert first["losses"] == second["losses"] and len(set(first["losses"])) == STEPS
    last_of_epoch = first["positions"].index([1, 8]) - 1
    assert {first["real"][last_of_epoch], second["real"][last_of_epoch]} == {0, 1}

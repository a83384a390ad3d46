"""A scaled loss trains what an unscaled one does, and a step that overflows on any rank leaves no trace on all.

Bit for bit, over groups of both kinds, in all pipelines, with tables that backward updates and tables that it does not.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import write_small_store
from tests.distributed.launch import run_ranks
from tests.distributed.scaling_cases import BAD_STEP, STEPS
from tests.train.tiny import walks

ALL_SHARDED = ["item_id", "town", "action"]
BATCH = {"train_batch_size": 4}
CASES: dict[str, dict[str, Any]] = {
    "none, sgd, all replicated": {
        "task": "ranking",
        "sharded": [],
        "optimizer": {"optimizer_str": "sgd", "learning_rate": 0.1, "momentum": 0.9},
        "trainer": {"pipeline_type": "none", **BATCH},
    },
    "native, rowwise_adagrad, clipped, accumulated": {
        "task": "ranking",
        "sharded": ALL_SHARDED,
        "optimizer": {"optimizer_str": "rowwise_adagrad", "learning_rate": 0.1},
        "trainer": {
            "pipeline_type": "native",
            "max_grad_norm": 0.05,
            "gradient_accumulation_steps": 2,
            "train_batch_size": 2,
        },
    },
    "prefetch, adam, averaged": {
        "task": "retrieval",
        "sharded": ALL_SHARDED,
        "optimizer": {"optimizer_str": "adam", "learning_rate": 0.01, "ema_decay": 0.5},
        "trainer": {"pipeline_type": "prefetch", **BATCH},
    },
    "native, adagrad, decayed, a table for any id": {
        "task": "retrieval",
        "dynamic": True,
        "optimizer": {"optimizer_str": "adagrad", "learning_rate": 0.1, "weight_decay": 0.1},
        "trainer": {"pipeline_type": "native", **BATCH},
    },
}
LAUNCHES = {"1 rank": (1, 1), "2 ranks": (2, 1), "2 × 2 ranks": (4, 2)}
SLOW = ("1 rank", "2 × 2 ranks")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAUNCHES],
)
def runs(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each rank's: case → way → what happened."""
    size, tp = LAUNCHES[request.param]
    place = tmp_path_factory.mktemp("scaling")
    write_small_store(place / "store", **walks(40))
    arguments = {"store": str(place / "store"), "output": str(place), "cases": CASES, "tp": tp}
    return run_ranks("tests.distributed.scaling_cases:run", size, timeout_s=200, **arguments)


@pytest.mark.parametrize("case", CASES)
def test_a_fixed_scale_changes_no_bit(runs: Any, case: str) -> None:
    for rank in runs:
        unscaled, fixed = rank[case]["unscaled"], rank[case]["fixed"]
        assert len({str(weights) for weights in unscaled["weights"]}) == STEPS + 1
        assert fixed["weights"] == unscaled["weights"] and fixed["losses"] == unscaled["losses"]
        assert fixed["scales"] == [[1024.0] * len(runs)] * STEPS


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_overflows_on_one_rank_changes_nothing_on_any(runs: Any, case: str) -> None:
    for rank in runs:
        told, expected = rank[case]["overflow"], rank[case]["without the batch"]
        before, after = told["weights"][BAD_STEP - 1 : BAD_STEP + 1]
        assert after == before
        assert told["weights"][:BAD_STEP] + told["weights"][BAD_STEP + 1 :] == expected["weights"]
        assert told["table steps"] == STEPS - 1
        # growth_interval is 2: the step before the overflow does not count any more after it
        assert told["scales"] == [[value] * len(runs) for value in (65536.0, 32768.0, 32768.0, 65536.0)]


@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_a_skipped_step_is_that_of_its_batch(runs: Any, case: str) -> None:
    ways = runs[0][case]
    assert ways["overflow"]["losses"][:BAD_STEP] == ways["unscaled"]["losses"][:BAD_STEP]

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.pipeline_cases import STEPS, write_store

HERE = "tests.distributed.pipeline_cases"
AHEAD = ("native", "prefetch")
RETRIEVAL = {"task": "retrieval"}
CASES: dict[str, dict[str, Any]] = {
    "ranking, sgd": {},
    "ranking, adagrad": {"optimizer": "adagrad"},
    "ranking, adam": {"optimizer": "adam"},
    "ranking, candidates": {"lines": ["DatasetArgs.max_num_candidates = 2"]},
    "two widths": {"lines": ["NetworkArgs.contextual_embedding_dim = 8"]},
    "all tables replicated": {"sharded": []},
    "clipped": {"lines": ["TrainerArgs.max_grad_norm = 0.05"]},
    "retrieval, in-batch negatives": RETRIEVAL | {"lines": ["RetrievalArgs.negatives = 'in_batch'"]},
    "retrieval, uniform negatives": RETRIEVAL
    | {"lines": ["RetrievalArgs.negatives = 'uniform'", "RetrievalArgs.num_negatives = 6"], "optimizer": "adam"},
    "retrieval, shared negatives": RETRIEVAL
    | {
        "lines": [
            "RetrievalArgs.negatives = 'uniform'",
            "RetrievalArgs.num_negatives = 6",
            "RetrievalArgs.shared_negatives = True",
        ]
    },
    "retrieval, all items": RETRIEVAL | {"lines": ["RetrievalArgs.negatives = 'full'"], "optimizer": "adagrad"},
    "relative bias": RETRIEVAL | {"lines": ["NetworkArgs.position_encoding = 'relative_bias'"], "sharded": ["item_id"]},
}
NEVER_EVALUATED = {f"{name}, never evaluated": CASES[name] | {"evaluate_after": []} for name in ("ranking, adam",)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pipelines") / "store"
    write_store(path)
    return str(path)


@pytest.fixture(scope="module")
def runs(store: str) -> dict[str, Any]:
    """Case → pipeline → what it told, in one process."""
    return run_ranks(f"{HERE}:train_cases", 1, timeout_s=200, store=store, cases=CASES | NEVER_EVALUATED)[0]


@pytest.mark.parametrize("kind", AHEAD)
@pytest.mark.parametrize("case", CASES)
def test_losses_metrics_weights_and_positions_are_those_of_none_bit_for_bit(runs: Any, case: str, kind: str) -> None:
    assert runs[case][kind] == runs[case]["none"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_compared_trains_over_an_uneven_epoch_end(runs: Any, case: str) -> None:
    told = runs[case]["none"]
    assert len(set(told["losses"])) == STEPS
    assert len({json.dumps(metrics) for metrics in told["metrics"]}) > 1
    last_of_epoch = told["positions"].index([1, 4]) - 1
    assert last_of_epoch > 2 and told["real"][last_of_epoch] == 1, "1 user, 3 empty sequences"


@pytest.mark.parametrize("kind", ["none", *AHEAD])
def test_evaluations_in_between_leave_training_as_it_is(runs: Any, kind: str) -> None:
    evaluated, never = runs["ranking, adam"][kind], runs["ranking, adam, never evaluated"][kind]
    assert evaluated["metrics"] and not never["metrics"]
    for what in ("losses", "positions", "weights"):
        assert evaluated[what] == never[what]


def test_iterators_end_and_follow_one_another_as_with_none(store: str) -> None:
    (results,) = run_ranks(f"{HERE}:iterators", 1, store=store)
    assert [len(losses) for losses in results["none"]["losses"]] == [0, 1, 2, 3, 4]
    assert results["none"]["left"] == "no error"
    for kind in AHEAD:
        assert results[kind]["losses"] == results["none"]["losses"]
        assert results[kind]["left"].startswith("2 batches of another iterator are in the pipeline")


def test_a_run_stopped_in_mid_epoch_goes_on_as_if_it_had_not_been(store: str, tmp_path: Path) -> None:
    (runs,) = run_ranks(f"{HERE}:stopped_and_resumed", 1, timeout_s=120, store=store, directory=str(tmp_path))
    assert list(runs["straight on"]["losses"]) == [str(step) for step in range(1, STEPS + 1)]
    for kind in AHEAD:
        stopped = runs[f"{kind}, stopped"]
        assert list(stopped["losses"]) == ["1", "2", "3"]
        assert stopped["position"] == [0, 12], "two more batches had been fetched, and must not be skipped"
        assert runs[f"{kind}, resumed"] == runs["straight on"]
        log = (tmp_path / kind / "log.txt").read_text()
        assert log.count(f"pipeline_type '{kind}' on a CPU: ") == 2, "once a run"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: copies on streams of their own")
def test_on_a_gpu_batches_are_copied_beside_the_stream_of_the_steps(store: str) -> None:
    (results,) = run_ranks(f"{HERE}:streams", 1, store=store)
    for kind in AHEAD:
        told = results[kind]
        assert set(told["forward"]) == set(results["none"]["forward"])
        assert told["copy"] and not set(told["copy"]) & set(told["forward"])
        assert told["losses"] == pytest.approx(results["none"]["losses"], rel=1e-4)

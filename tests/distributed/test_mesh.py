from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.distributed.launch import REPOSITORY, RankFailure, run_ranks

HERE = "tests.distributed.mesh_cases"


def test_ranks_threads_and_seeds_on_two_ranks() -> None:
    first, second = run_ranks(f"{HERE}:describe", 2)
    assert first["ranks"] == [0, 2, 0, 2, 0, 1]
    assert second["ranks"] == [1, 2, 1, 2, 0, 1]
    assert second["hosts"] == [1, 2]
    assert [first["main"], second["main"]] == [True, False]
    assert first["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    assert first["deterministic"] and first["tf32"] == [True, True]
    assert first["weights"] == second["weights"]
    assert first["dropout"] != second["dropout"]
    assert first["weights"] != first["dropout"]


def test_plain_python_is_a_world_of_one_without_any_environment() -> None:
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {key: value for key, value in os.environ.items() if key not in launcher}
    environment["PYTHONPATH"] = str(REPOSITORY)
    program = f"from {HERE} import describe; print(describe()['ranks'])"
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert run.stdout.strip() == "[0, 1, 0, 1, 0, 1]", run.stderr
    assert "Apex" not in run.stderr


def test_groups_of_neighbours_share_a_dense_model() -> None:
    ranks = [result["ranks"] for result in run_ranks(f"{HERE}:describe", 2, tensor_parallel_size=2)]
    assert ranks == [[0, 2, 0, 1, 0, 2], [1, 2, 0, 1, 1, 2]]


def test_collectives_and_their_gradients() -> None:
    results = run_ranks(f"{HERE}:collectives", 2)
    for rank, result in enumerate(results):
        assert result["gathered"] == [1, 1, 2, 2]
        # rank r weighs row i by (r + 1) · (i + 1); the sum over ranks is 3 · (i + 1)
        assert result["gradient"] == [[3, 6], [9, 12]][rank]
        assert result["rows"] == [0, 0, 1, 1]
        assert result["ids"] == [0, -1, 0, 1]
        assert result["row_gradient"] == [[2.0, 2.0]] * (rank + 1)
        assert (result["max"], result["sum"]) == (11, 4.0)
        assert result["objects"] == [{"rank": 0}, {"rank": 1}]


def test_the_failure_of_one_rank_ends_all() -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(f"{HERE}:rank_one_fails", 2, timeout_s=40)
    assert failure.value.rank is not None, "no rank may be left waiting"

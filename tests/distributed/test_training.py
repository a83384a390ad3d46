"""One global batch gives one result: whole runs on 1, 2 and 3 ranks, interrupted and not."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.config.args import RankingTaskArgs
from tests.conftest import write_small_store
from tests.distributed.launch import Launch, run_cases
from tests.distributed.training_cases import train, users_evaluated
from tests.train.tiny import ACTIONS, ITEM_FEATURES, TOWER, shown, walks

SIZES = (1, 2, 3)
ON_THREE_RANKS = ("ranking", "in_batch", "uniform")
"""The cases that are trained on 3 ranks, too. The others are by a slow test."""
GLOBAL_BATCH, ITERATIONS = 12, 14

SGD = {"optimizer_str": "sgd", "learning_rate": 0.05}
CASES: dict[str, Any] = {
    "ranking": {"task": "ranking"},  # the items' table is sharded by rows, the others are replicated
    "ranking, candidates, sharded": {
        "task": "ranking",
        "sharded": ["item_id", "town", "action"],
        "dataset": {"max_num_candidates": 2},
    },
    "ranking, relative bias, replicated": {
        "task": "ranking",
        "sharded": [],
        "network": {"position_encoding": "relative_bias"},
    },
    "ranking, requests": {"task": "ranking", "dataset": {"candidates": "requests", "max_num_candidates": 3}},
    "in_batch": {"task": "retrieval"},
    "in_batch, draws, seen": {
        "task": "retrieval",
        "dataset": {"max_sequence_length": 4},
        "task_args": {"num_negatives": 5, "mask_seen": True},
    },
    "uniform": {"task": "retrieval", "task_args": {"negatives": "uniform", "num_negatives": 5}},
    "uniform, shared, replicated": {
        "task": "retrieval",
        "sharded": [],
        "task_args": {"negatives": "uniform", "num_negatives": 5, "shared_negatives": True},
    },
    "mixed, logQ, random windows, seen": {
        "task": "retrieval",
        "dataset": {"random_windows": True, "max_sequence_length": 5},
        "task_args": {
            "negatives": "mixed",
            "num_negatives": 5,
            "logq_correction": True,
            "mask_seen": True,
        },
    },
    "full, last event": {
        "task": "retrieval",
        "dataset": {"query_time": "last_event"},
        "network": {"position_encoding": "relative_bias"},
        "task_args": {"negatives": "full"},
    },
    "in_batch, item tower": {
        **TOWER,
        "task": "retrieval",
        "sharded": ["item_id", "tags"],
        "task_args": {"item_tower": True},
    },
}
METRICS = {
    "ranking": ("AUC", "GAUC", "ACC", "LOGLOSS", "NE"),
    "retrieval": ("HR@3", "NDCG@3", "MRR", "MRR@5", "HR@500"),
}
RESUMED: dict[str, Any] = {
    "ranking": {"task": "ranking", "network": {"hidden_dropout": 0.3, "position_encoding": "relative_bias"}},
    "retrieval": {
        **TOWER,
        "task": "retrieval",
        "network": {"hidden_dropout": 0.3},
        "task_args": {"negatives": "uniform", "num_negatives": 5, "item_tower": True},
        "schedule": {"warmup_iters": 6},
    },
}
FIRST, WHOLE = 5, 9
TASKS = {
    "binary": RankingTaskArgs(name="odd", label="action", bit_mask=1, metrics=("GAUC", "NE", "NDCG@2")),
    "class": RankingTaskArgs(name="code", label="action", kind="class", num_classes=ACTIONS, metrics=("AUC", "ACC")),
    "regression": RankingTaskArgs(
        name="size", label="action", kind="regression", metrics=("XAUC", "RMSE", "MAE", "AUC>=2", "NDCG")
    ),
}
"""Tasks of each kind."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores, and room for the runs: 31 users, of whom no batch size divides the number, and 7."""
    path = tmp_path_factory.mktemp("training")
    users = walks(31)
    write_small_store(path / "store", **users, item_features=ITEM_FEATURES, requests=shown(users["items"]))
    write_small_store(path / "seven", **walks(7), item_features=ITEM_FEATURES)
    return path


def case(
    function: Callable[..., dict[str, Any]], place: Path, name: str, options: Any, store: str = "store", **trainer: Any
) -> Any:
    """The run as a case, with global batch sizes, in a directory of its own."""
    sizes = {"train_batch_size": GLOBAL_BATCH, "eval_batch_size": GLOBAL_BATCH}
    places = {"store": str(place / store), "output": str(place / name)}
    return partial(function, **places, **options, trainer={**sizes, **trainer})


def trained(place: Path, size: int, names: Iterable[str]) -> dict[str, Any]:
    cases = {}
    for name in names:
        options = CASES[name]
        saving = {"ckpt_save_interval": ITERATIONS // 2} if size == 1 else {}
        trainer = {"max_train_iters": ITERATIONS, "max_grad_norm": 0.5, **saving}
        cases[name] = case(train, place, f"{size}/{name}", {"optimizer": SGD, **options}, **trainer)
    return cases


def from_checkpoints_of_one_rank(place: Path, size: int) -> dict[str, Any]:
    """Evaluate what one rank has learnt; train on from the middle of its run."""
    cases = {}
    for task, name in (("ranking", "ranking"), ("retrieval", "in_batch")):
        checkpoint = f"{place}/1/{name}/checkpoints/iteration_{{:08d}}"
        options = {"optimizer": SGD, **CASES[name], "task_args": {"eval_metrics": METRICS[task]}}
        trainer = {"max_train_iters": ITERATIONS, "max_grad_norm": 0.5}
        end, middle = (checkpoint.format(iteration) for iteration in (ITERATIONS, ITERATIONS // 2))
        cases[f"evaluate {task}"] = case(
            train, place, f"{size}/evaluate-{task}", options, **trainer, eval_at_end=True, ckpt_load_dir=end
        )
        cases[f"go on {task}"] = case(train, place, f"{size}/go-on-{task}", options, **trainer, ckpt_load_dir=middle)
        cases[f"seven {task}"] = case(
            users_evaluated, place, f"{size}/seven-{task}", options, store="seven", eval_batch_size=2 * size
        )
    return cases


def tasks_of_each_kind(place: Path, size: int) -> dict[str, Any]:
    """Evaluate a new model of tasks that the user defines."""
    task_args = {"prediction_head_arch": [8], "eval_metrics": ("AUC",), "tasks": [*TASKS.values()]}
    options = {"task": "ranking", "dataset": {"max_num_candidates": 3}, "task_args": task_args}
    return {"tasks": case(users_evaluated, place, f"{size}/tasks", options)}


def interrupted(place: Path, size: int) -> dict[str, Any]:
    cases = {}
    for name, options in RESUMED.items():
        whole = {"max_train_iters": WHOLE, "eval_at_end": True}
        first = {"max_train_iters": FIRST, "ckpt_save_interval": 100}
        cases[f"whole {name}"] = case(train, place, f"{size}/whole-{name}", options, **whole)
        cases[f"repeated {name}"] = case(train, place, f"{size}/repeated-{name}", options, **whole)
        cases[f"first {name}"] = case(train, place, f"{size}/resumed-{name}", options, **first)
    return cases


def resumed(place: Path, size: int) -> dict[str, Any]:
    trainer = {"max_train_iters": WHOLE, "eval_at_end": True, "ckpt_load_dir": "auto"}
    return {name: case(train, place, f"{size}/resumed-{name}", options, **trainer) for name, options in RESUMED.items()}


@pytest.fixture(scope="module")
def launches(place: Path) -> dict[int, list[dict[str, Any]]]:
    """World size → results of all ranks, from one launch each."""
    results = {}
    for size in SIZES:
        cases = trained(place, size, CASES if size < 3 else ON_THREE_RANKS) | from_checkpoints_of_one_rank(place, size)
        cases |= tasks_of_each_kind(place, size)
        if size < 3:
            cases |= interrupted(place, size)
        results[size] = run_cases(Launch(size, timeout_s=200), cases)
    return results


@pytest.fixture(scope="module")
def runs(launches: Any) -> dict[int, dict[str, Any]]:
    """World size → case → what the main rank reports."""
    return {size: results[0] for size, results in launches.items()}


def assert_close(left: dict[str, Any], right: dict[str, Any], tolerance: float) -> None:
    assert left.keys() == right.keys() and left
    for name in left:
        scale = np.maximum(1.0, np.abs(right[name]))
        assert (np.abs(np.array(left[name]) - right[name]) / scale).max() < tolerance, name


def assert_same_training(others: dict[str, Any], alone: dict[str, Any]) -> None:
    np.testing.assert_allclose(list(others["losses"].values()), list(alone["losses"].values()), rtol=1e-5)
    assert_close(others["tables"], alone["tables"], 1e-5)
    assert_close(others["dense"], alone["dense"], 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_ranks_trains_the_same_model(runs: Any, name: str) -> None:
    assert len(runs[1][name]["losses"]) == ITERATIONS
    for size in (2, 3) if name in ON_THREE_RANKS else (2,):
        assert_same_training(runs[size][name], runs[1][name])


@pytest.mark.slow
def test_three_ranks_train_the_same_model_in_every_other_case(runs: Any, place: Path) -> None:
    names = [name for name in CASES if name not in ON_THREE_RANKS]
    for name, others in run_cases(Launch(3, timeout_s=200), trained(place, 3, names))[0].items():
        assert_same_training(others, runs[1][name])


@pytest.mark.parametrize("name", CASES)
def test_the_runs_that_are_compared_learn_something(runs: Any, name: str) -> None:
    losses = list(runs[1][name]["losses"].values())
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])


def test_the_runs_that_are_compared_end_epochs_with_an_uneven_batch(runs: Any) -> None:
    for size in SIZES:
        assert runs[size]["in_batch"]["batches_per_epoch"] == 3  # 31 = 12 + 12 + 7 users: 3 and 4, or 2, 2 and 3
        assert runs[size]["ranking"]["batches_per_epoch"] == 2  # 22 = 12 + 10 users


@pytest.mark.parametrize("task", METRICS)
def test_any_number_of_ranks_gives_the_same_metrics_of_the_same_weights(runs: Any, task: str) -> None:
    alone = runs[1][f"evaluate {task}"]
    assert alone["losses"] == {}, "nothing was trained"
    assert set(METRICS[task]) == set(next(iter(alone["metrics"].values())))
    for size in (2, 3):
        others = runs[size][f"evaluate {task}"]
        assert others["tables"] == alone["tables"] and others["dense"] == alone["dense"]
        for split, metrics in alone["metrics"].items():
            for metric, value in metrics.items():
                if metric in ("LOGLOSS", "NE"):
                    assert others["metrics"][split][metric] == pytest.approx(value, rel=1e-12)
                else:
                    assert others["metrics"][split][metric] == value, (size, split, metric)


@pytest.mark.parametrize("size", SIZES)
def test_any_number_of_ranks_gives_the_same_metrics_of_tasks_of_each_kind(launches: Any, size: int) -> None:
    by_rank = [results["tasks"] for results in launches[size]]
    assert all(rank["metrics"] == by_rank[0]["metrics"] for rank in by_rank)
    alone = launches[1][0]["tasks"]["metrics"]
    assert set(alone) == {f"{name}/{task.name}" for task in TASKS.values() for name in task.metrics or ()}
    assert np.isfinite(list(alone.values())).all()
    assert by_rank[0]["metrics"] == pytest.approx(alone, rel=1e-6)


def test_a_cutoff_beyond_the_corpus_finds_every_item(runs: Any) -> None:
    for size in SIZES:
        for metrics in runs[size]["evaluate retrieval"]["metrics"].values():
            assert metrics["HR@500"] == 1.0 > metrics["MRR"]


@pytest.mark.parametrize("task", METRICS)
def test_a_checkpoint_of_one_rank_is_trained_on_by_any_number(runs: Any, task: str) -> None:
    name = {"ranking": "ranking", "retrieval": "in_batch"}[task]
    straight = [loss for iteration, loss in runs[1][name]["losses"].items() if int(iteration) > ITERATIONS // 2]
    assert list(runs[1][f"go on {task}"]["losses"].values()) == straight
    for size in (2, 3):
        np.testing.assert_allclose(list(runs[size][f"go on {task}"]["losses"].values()), straight, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_evaluation_counts_each_of_seven_users_once(launches: Any, size: int) -> None:
    by_rank = [results["seven retrieval"] for results in launches[size]]
    assert sorted(user for rank in by_rank for user in rank["users"]) == list(range(7))
    assert all({*rank["counts"]} == {7} for rank in by_rank)
    assert all(rank["metrics"] == launches[1][0]["seven retrieval"]["metrics"] for rank in by_rank)


@pytest.mark.parametrize("size", SIZES)
def test_ranks_that_have_no_user_to_evaluate_take_part(launches: Any, size: int) -> None:
    by_rank = [results["seven ranking"] for results in launches[size]]
    users = sorted(user for rank in by_rank for user in rank["users"])
    assert len(users) == len(set(users)) == 2, "5 of the 7 users are trained on"
    assert any(not rank["users"] for rank in by_rank) == (size == 3)
    assert all(rank["counts"] == launches[1][0]["seven ranking"]["counts"] for rank in by_rank)
    assert all(rank["metrics"] == by_rank[0]["metrics"] for rank in by_rank)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_mid_epoch_goes_on_in_new_processes_bit_for_bit(
    runs: Any, place: Path, size: int
) -> None:
    continued = run_cases(Launch(size, timeout_s=100), resumed(place, size))[0]
    for name in RESUMED:
        whole, first, second = runs[size][f"whole {name}"], runs[size][f"first {name}"], continued[name]
        assert FIRST % whole["batches_per_epoch"] != 0
        assert len(first["losses"]) == FIRST
        # The run's directory is continued, too: its records are those of both processes.
        assert second["losses"] == whole["losses"] and len(whole["losses"]) == WHOLE
        assert second["metrics"] == whole["metrics"]
        assert second["tables"] == whole["tables"]
        assert second["dense"] == whole["dense"]


@pytest.mark.parametrize("size", [1, 2])
def test_the_same_run_twice_is_the_same_bit_for_bit(runs: Any, size: int) -> None:
    for name in RESUMED:
        assert runs[size][f"repeated {name}"] == runs[size][f"whole {name}"]

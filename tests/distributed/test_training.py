"""One global batch gives one result: whole runs on 1 and 3 ranks, on 3 also in micro-batches, and on shards.

Batches of about equally many tokens on each rank train what one process trains on them.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pytest

from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.loader import build_loader
from hstu.data.sampling.sampler import BatchPlan, SamplerPosition, TrainSampler, epoch_order
from hstu.parallel.mesh import Mesh, seed_initial_weights
from hstu.pipeline.pipelines import SequentialPipeline
from hstu.pipeline.step import TrainStep
from hstu.train.builder import build_model
from hstu.train.sources import StoreSource, open_source
from tests.conftest import write_small_store
from tests.distributed.launch import Launch, run_cases
from tests.distributed.pipeline_cases import train_whole, users_evaluated
from tests.train.tiny import ITEM_FEATURES, OF_THE_ACTION, TOWER, TinyOptions, shown, tiny_config, walks

SIZES = (1, 3)
"""Ranks."""
GLOBAL_BATCH, ITERATIONS = 12, 10
WHOLE: dict[str, Any] = {"max_train_iters": ITERATIONS, "max_grad_norm": 0.5}

LIMITED = {"sparse_max_gradient": 0.002}
SGD = {"optimizer_str": "sgd", "learning_rate": 0.05}
ADAM = {"optimizer_str": "adam", "learning_rate": 0.01, "adam_eps": 1e-4}
CASES: dict[str, dict[str, Any]] = {
    "ranking": {"task": "ranking"},  # the items' table is sharded by rows, the others are replicated
    "ranking, candidates": {
        "task": "ranking",
        "sharded": ["item_id", "town", "action"],
        "dataset": {"max_num_candidates": 2},
        "optimizer": {**ADAM, "optimizer_str": "adagrad"},
        "network": {"contextual_embedding_dim": 8},
    },
    "ranking, requests": {"task": "ranking", "dataset": {"candidates": "requests", "max_num_candidates": 3}},
    "ranking, tasks": {"task": "ranking", "dataset": {"max_num_candidates": 3}, "task_args": OF_THE_ACTION},
    "in_batch": {"task": "retrieval"},
    "in_batch, draws, seen": {
        "task": "retrieval",
        "sharded": [],
        "optimizer": SGD | LIMITED,
        "dataset": {"max_sequence_length": 4},
        "task_args": {"num_negatives": 5, "mask_seen": True},
    },
    "mixed, logQ, random windows, seen": {
        "task": "retrieval",
        "optimizer": ADAM | LIMITED,
        "dataset": {"window_stride": "random", "max_sequence_length": 5},
        "task_args": {
            "negatives": "mixed",
            "num_negatives": 5,
            "logq_correction": True,
            "mask_seen": True,
        },
    },
    "full, either time": {
        "task": "retrieval",
        "optimizer": {**ADAM, "optimizer_str": "rowwise_adagrad", **LIMITED},
        "dataset": {"query_time": "either"},
        "network": {"position_encoding": "relative_bias"},
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
METRICS = {
    "ranking": ("AUC", "GAUC", "ACC", "LOGLOSS", "NE"),
    "retrieval": ("HR@3", "NDCG@3", "MRR", "MRR@5", "HR@500"),
}
GOES_ON = {"ranking": "ranking", "retrieval": "full, either time"}
SHARDS = (1, 4, 64)
IN_SHARDS = {"ranking": "ranking, requests", "retrieval": "mixed, logQ, random windows, seen"}
"""Task → the case that is trained on stores of these numbers of shards."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores, and room for the runs: 31 users, of whom no batch size divides the number, and 7."""
    path = tmp_path_factory.mktemp("training")
    users = walks(31)
    write_small_store(path / "store", **users, item_features=ITEM_FEATURES, requests=shown(users["items"]))
    write_small_store(path / "seven", **walks(7), item_features=ITEM_FEATURES)
    for shards in SHARDS:
        store = path / f"in {shards}"
        write_small_store(store, **users, item_features=ITEM_FEATURES, requests=shown(users["items"]), shards=shards)
    return path


def case(
    function: Callable[..., dict[str, Any]],
    place: Path,
    name: str,
    options: Mapping[str, Any],
    trainer: Mapping[str, Any],
    store: str = "store",
) -> partial[dict[str, Any]]:
    """The run as a case, with global batch sizes, in a directory of its own."""
    sizes = {"train_batch_size": GLOBAL_BATCH, "eval_batch_size": GLOBAL_BATCH}
    directories = {"store": str(place / store), "output": str(place / name)}
    return partial(function, **directories, **{"optimizer": SGD, **options}, trainer={**sizes, **trainer})


def trained(place: Path, size: int) -> dict[str, Any]:
    cases = {}
    for number, (name, options) in enumerate(CASES.items()):
        saving = {"ckpt_save_interval": ITERATIONS // 2} if size == 1 else {}
        cases[name] = case(train_whole, place, f"{size}/{name}", options, WHOLE | saving)
        in_parts = {
            "train_batch_size": GLOBAL_BATCH // 2,
            "gradient_accumulation_steps": 2,
            "pipeline_type": ("none", "native", "prefetch")[number % 3],
        }
        if size == 3:
            cases[f"{name}, in parts"] = case(train_whole, place, f"{size}/{name}, in parts", options, WHOLE | in_parts)
    return cases


def from_checkpoints_of_one_rank(place: Path, size: int) -> dict[str, Any]:
    """Evaluate what one rank has learnt; train on from the middle of its run."""
    cases = {}
    for task, name in GOES_ON.items():
        options = {**CASES[name], "task_args": {"eval_metrics": METRICS[task]}}
        end, middle = (
            {**WHOLE, "ckpt_load_dir": f"{place}/1/{name}/checkpoints/iteration_{iteration:08d}"}
            for iteration in (ITERATIONS, ITERATIONS // 2)
        )
        evaluation = f"evaluate {task}"
        cases[evaluation] = case(train_whole, place, f"{size}/{evaluation}", options, {**end, "eval_at_end": True})
        cases[f"go on {task}"] = case(train_whole, place, f"{size}/go on {task}", options, middle)
        cases[f"seven {task}"] = case(
            users_evaluated, place, f"{size}/seven {task}", options, {"eval_batch_size": 2 * size}, store="seven"
        )
    return cases


def in_shards(place: Path, size: int) -> dict[str, Any]:
    """Runs that shuffle stores in shards, whole or in windows, and those that one rank began on 4 shards."""
    cases = {}
    for task, name in IN_SHARDS.items():
        for kind, windows in (("whole", 0), ("windows", 2)):
            options = CASES[name] | {"dataset": CASES[name]["dataset"] | {"shuffle": True}}
            options["dataset"] |= {"shuffle_window_shards": windows}
            for shards in SHARDS if kind == "whole" else (4,):
                saving = {"ckpt_save_interval": ITERATIONS // 2} if size == 1 else {}
                key, saved = f"{task}, {kind} in {shards}", f"{place}/1/{task}, {kind} in 4/checkpoints"
                trainer = {**WHOLE, "eval_at_end": True}
                cases[key] = case(train_whole, place, f"{size}/{key}", options, trainer | saving, f"in {shards}")
            trainer["ckpt_load_dir"] = f"{saved}/iteration_{ITERATIONS // 2:08d}"
            key = f"{task}, {kind} goes on"
            cases[key] = case(train_whole, place, f"{size}/{key}", options, trainer, f"in {shards}")
    return cases


@pytest.fixture(scope="module")
def launches(place: Path) -> dict[int, list[dict[str, Any]]]:
    """World size → results of all ranks, from one launch each."""
    return {
        size: run_cases(
            Launch(size, timeout_s=300),
            (trained(place, size) | from_checkpoints_of_one_rank(place, size) if size in SIZES else {})
            | in_shards(place, size),
        )
        for size in (1, 2, 3)
    }


@pytest.fixture(scope="module")
def runs(launches: Any) -> dict[int, dict[str, Any]]:
    """World size → case → what the main rank reports."""
    return {size: results[0] for size, results in launches.items()}


def assert_same_training(others: dict[str, Any], alone: dict[str, Any]) -> None:
    np.testing.assert_allclose(list(others["losses"].values()), list(alone["losses"].values()), rtol=1e-5)
    np.testing.assert_allclose(others["by task"], alone["by task"], rtol=1e-5)
    for part in ("tables", "dense"):
        assert others[part].keys() == alone[part].keys() and alone[part]
        for name, weight in alone[part].items():
            np.testing.assert_allclose(others[part][name], weight, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_ranks_trains_the_same_model(runs: Any, name: str) -> None:
    losses = runs[1][name]["losses"].values()
    assert len(losses) == len(set(losses)) == ITERATIONS
    assert_same_training(runs[3][name], runs[1][name])


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_train_as_the_whole_batch_does(runs: Any, name: str) -> None:
    parts = runs[3][f"{name}, in parts"]
    assert parts["batches_per_epoch"] == runs[1][name]["batches_per_epoch"] < ITERATIONS
    assert_same_training(parts, runs[1][name])


def test_the_runs_that_are_compared_end_epochs_with_an_uneven_batch(runs: Any) -> None:
    for size in SIZES:
        assert runs[size]["in_batch"]["batches_per_epoch"] == 3  # 31 = 12 + 12 + 7 users: 3 and 4, or 2, 2 and 3
        assert runs[size]["ranking"]["batches_per_epoch"] == 2  # 22 = 12 + 10 users


@pytest.mark.parametrize("task", METRICS)
def test_any_number_of_ranks_gives_the_same_metrics_of_the_same_weights(runs: Any, task: str) -> None:
    alone = runs[1][f"evaluate {task}"]
    assert alone["losses"] == {}, "nothing was trained"
    asked = [f"{name}/last_event" for name in METRICS[task] if task == "retrieval"]
    assert {*METRICS[task], *asked} == set(next(iter(alone["metrics"].values())))
    others = runs[3][f"evaluate {task}"]
    assert others["tables"] == alone["tables"] and others["dense"] == alone["dense"]
    for split, metrics in alone["metrics"].items():
        for metric, value in metrics.items():
            if metric in ("LOGLOSS", "NE"):
                assert others["metrics"][split][metric] == pytest.approx(value, rel=1e-12)
            else:
                assert others["metrics"][split][metric] == value, (split, metric)


@pytest.mark.parametrize("task", METRICS)
def test_a_checkpoint_of_one_rank_is_trained_on_by_any_number(runs: Any, task: str) -> None:
    name = GOES_ON[task]
    straight = [loss for iteration, loss in runs[1][name]["losses"].items() if int(iteration) > ITERATIONS // 2]
    assert list(runs[1][f"go on {task}"]["losses"].values()) == straight
    np.testing.assert_allclose(list(runs[3][f"go on {task}"]["losses"].values()), straight, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("task", IN_SHARDS)
def test_shards_change_no_bit_of_a_run(runs: Any, task: str, size: int) -> None:
    whole = runs[size][f"{task}, whole in 1"]
    assert len({*whole["losses"].values()}) == ITERATIONS and whole["metrics"]
    for shards in SHARDS[1:]:
        assert runs[size][f"{task}, whole in {shards}"] == whole
    windows = runs[size][f"{task}, windows in 4"]
    assert windows["losses"] != whole["losses"]
    assert_same_training(windows, runs[1][f"{task}, windows in 4"])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["whole", "windows"])
@pytest.mark.parametrize("task", IN_SHARDS)
def test_a_run_on_shards_goes_on_with_the_same_samples(runs: Any, task: str, kind: str, size: int) -> None:
    """The order of all samples goes on from 4 to 64 shards, too."""
    found = [*runs[size][f"{task}, {kind} goes on"]["losses"].values()]
    straight = [*runs[1][f"{task}, {kind} in 4"]["losses"].values()][ITERATIONS // 2 :]
    np.testing.assert_allclose(found, straight, rtol=0 if size == 1 else 1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_evaluation_counts_each_of_seven_users_once(launches: Any, size: int) -> None:
    by_rank = [results["seven retrieval"] for results in launches[size]]
    assert sorted(user for rank in by_rank for user in rank["users"]) == list(range(7))
    assert all(rank["count"] == 7 and rank["pickled"] == 0 for rank in by_rank)
    assert all(rank["divided"] == pytest.approx(rank["metrics"], rel=1e-12) for rank in by_rank)
    assert all(rank["metrics"] == launches[1][0]["seven retrieval"]["metrics"] for rank in by_rank)


@pytest.mark.parametrize("size", SIZES)
def test_ranks_that_have_no_user_to_evaluate_take_part(launches: Any, size: int) -> None:
    by_rank = [results["seven ranking"] for results in launches[size]]
    users = sorted(user for rank in by_rank for user in rank["users"])
    assert len(users) == len(set(users)) == 2, "5 of the 7 users are trained on"
    assert any(not rank["users"] for rank in by_rank) == (size == 3)
    assert all(rank["count"] == launches[1][0]["seven ranking"]["count"] for rank in by_rank)
    assert all(rank["pickled"] == 0 for rank in by_rank)
    assert all(rank["divided"] == pytest.approx(rank["metrics"], rel=1e-12, nan_ok=True) for rank in by_rank)
    assert all(rank["metrics"] == by_rank[0]["metrics"] for rank in by_rank)


STEPS = 12
USERS, ITEMS, ACTIONS, MAX_ITEMS, BATCH = 110, 37, 4, 48, 16
BUDGET = 160
RANKS = 3
BY_TOKENS = {"tokens_per_rank": BUDGET, "train_batch_size": BATCH}
BY_TOKENS_CASES: dict[str, Any] = {
    "ranking": {"task": "ranking"},
    "ranking, balanced": {"task": "ranking", "trainer": {"enable_balanced_shuffler": True}},
    "ranking, tasks": {
        "task": "ranking",
        "dataset": {"max_sequence_length": MAX_ITEMS, "max_num_candidates": 2},
        "task_args": OF_THE_ACTION,
    },
    "in batch": {"task": "retrieval", "task_args": {"negatives": "in_batch"}},
    "shared": {
        "task": "retrieval",
        "task_args": {"negatives": "uniform", "num_negatives": 6, "shared_negatives": True},
    },
}


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """World size → rank → case → what the rank reports."""
    directory: Path = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(4)
    lengths = np.clip(np.rint(rng.lognormal(2.2, 0.8, USERS)), 4, MAX_ITEMS + 9).astype(int)
    items = [rng.integers(0, ITEMS, length).tolist() for length in lengths]
    store = write_small_store(
        directory / "store",
        items,
        actions=[[item % ACTIONS for item in row] for row in items],
        context={"town": (np.arange(USERS) % 3).tolist()},
        num_items=ITEMS,
        num_actions=ACTIONS,
    )
    common = {
        "store": str(store.path),
        "dataset": {"max_sequence_length": MAX_ITEMS},
        "network": {"num_layers": 1, "num_position_buckets": 128},
        "optimizer": {"optimizer_str": "sgd", "learning_rate": 0.05},
    }
    return {
        size: run_cases(
            Launch(size, timeout_s=150),
            {
                name: partial(
                    train_by_tokens,
                    output=str(directory / f"{size} {name}"),
                    as_ranks=RANKS if size == 1 else None,
                    **common | options | {"trainer": BY_TOKENS | (options.get("trainer", {}) if size > 1 else {})},
                )
                for name, options in BY_TOKENS_CASES.items()
            },
        )
        for size in (1, RANKS)
    }


def train_by_tokens(
    mesh: Mesh, task: str, store: str, output: str, as_ranks: int | None = None, **options: Unpack[TinyOptions]
) -> dict[str, Any]:
    """The losses and positions.

    ``as_ranks``: train on the batches that so many ranks would share, each as one batch.
    """
    config = tiny_config(task, store, output, **options)
    seed_initial_weights(config.trainer.seed)
    source = open_source(config, mesh)
    assert isinstance(source, StoreSource)
    model, optimizers = build_model(config, source, mesh)
    pipeline = SequentialPipeline(TrainStep(model, optimizers, mesh))
    batches = source.train_batches(SamplerPosition()) if as_ranks is None else _joined(source, as_ranks)
    losses, positions = [], []
    model.train()
    for _ in range(STEPS):
        step = pipeline.progress(batches)
        losses.append(step.losses.tolist())
        assert step.batch.position is not None
        positions.append([step.batch.position.epoch, step.batch.position.consumed])
    return {"losses": losses, "positions": positions}


def _joined(source: StoreSource, num_ranks: int) -> Iterator[HSTUBatch]:
    trainer, samples = source._config.trainer, source._train_samples
    assert source._partition is not None
    first = TrainSampler(len(samples), BATCH, 0, num_ranks, trainer.seed, True, partition=source._partition)

    def plans() -> Iterator[BatchPlan]:
        for plan in first:
            ordinals = np.arange(plan.global_start, plan.position.consumed)
            order = epoch_order(len(samples), trainer.seed, plan.epoch, shuffle=True)
            yield BatchPlan(order(ordinals), ordinals, plan.epoch, plan.global_start, plan.position)

    return build_loader(source._collator(source.store, samples, num_ranks * BATCH), plans())


@pytest.mark.parametrize("case", BY_TOKENS_CASES)
def test_losses_are_those_of_one_process_on_the_same_global_batches(shared_runs: Any, case: str) -> None:
    alone, shared = shared_runs[1][0][case], shared_runs[RANKS][0][case]
    assert shared["positions"] == alone["positions"]
    assert abs(alone["losses"][0][0] - alone["losses"][-1][0]) > 1e-3, "nothing was learnt"
    np.testing.assert_allclose(shared["losses"], alone["losses"], rtol=1e-6)

"""A checkpoint that goes from one number of ranks, size of groups and sharding to the next stays what it was."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pytest

from hstu.checkpoint.load import load
from hstu.checkpoint.save import save
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh
from hstu.pipeline.step import StepResult
from tests.distributed.launch import Launch, run_cases
from tests.distributed.tensor_cases import (
    MIXED,
    RunOptions,
    consolidated,
    make_config,
    new_run,
    train_steps,
    write_store,
)

HOPS = [
    Launch(1), Launch(2), Launch(4, tp=2), Launch(4, shards=2), Launch(4, shards=2), Launch(3), Launch(1),
]  # fmt: skip
DENSE = ("none", "optimizer", "weights", "weights", "optimizer", "none", "none")
"""DataParallelArgs.sharding at each hop."""
BATCH = 12  # a multiple of all numbers of ranks
SAMPLES = {"ranking": 23, "retrieval": 33}
BEFORE = {"ranking": 3, "retrieval": 2}  # steps until the checkpoint, which lies in the middle of an epoch
SEVEN_ROWS = "age/EmbeddingArgs.item_vocab_size_or_capacity = 7"
PADDED = ["NetworkArgs.item_embedding_dim = 6", SEVEN_ROWS]  # tables of width 6 are stored in rows of 8, sharded
ALL = ["item_id", "action", "age"]
ROWS = {"sharding": "row_wise", "replicated": ["action"]}
MOVES = [
    {"sharding": "row_wise", "replicated": ["action"]},
    {"sharding": "table_wise", "replicated": []},
    {"sharding": "column_wise", "replicated": ["age"]},
    {"sharding": "table_wise", "replicated": ["item_id"]},
    {"sharding": "column_wise", "replicated": []},
    {"replicated": ALL},
    {"sharding": "row_wise", "replicated": ["action"]},
]
"""How the tables lie after each hop."""
ROWWISE_MOVES = [
    {"sharding": kind, "replicated": []}
    for kind in ("row_wise", "table_wise", "auto", "row_wise", "auto", "table_wise", "row_wise")
]
CASES: dict[str, Any] = {
    **{f"{name}, rows": {"optimizer": name} for name in ("rowwise_adagrad", "adagrad", "adam", "sgd")},
    **{f"{name}, moves": {"optimizer": name, "moves": MOVES} for name in ("adagrad", "adam", "sgd")},
    "rowwise_adagrad, moves": {"optimizer": "rowwise_adagrad", "moves": ROWWISE_MOVES},
    "mixed": {"optimizer": "adam", "bindings": MIXED},
    "momentum": {"optimizer": "sgd", "bindings": ["OptimizerArgs.momentum = 0.9"], "task": "retrieval"},
    "retrieval, moves": {"optimizer": "adagrad", "moves": MOVES, "task": "retrieval"},
}


def options_at(hop: int, case: dict[str, Any]) -> dict[str, Any]:
    """The options of a case at a hop."""
    per_rank = f"TrainerArgs.train_batch_size = {BATCH // HOPS[hop].ranks}"
    kept = {name: value for name, value in case.items() if name != "moves"}
    dense = [f"DataParallelArgs.sharding = {DENSE[hop]!r}", f"DataParallelArgs.shard_group_size = {HOPS[hop].shards}"]
    bindings, moves = [*PADDED, *case.get("bindings", []), per_rank, *dense], case.get("moves", [ROWS] * len(HOPS))
    return {**kept, "before": BEFORE[case.get("task", "ranking")], "bindings": bindings, **moves[hop]}


def take_a_hop(
    mesh: Mesh, store: str, load_from: Path | None, save_to: Path, before: int, **options: Unpack[RunOptions]
) -> dict[str, Any]:
    """Load a checkpoint (or train ``before`` steps), save it again, and train two steps.

    Returns its tensors, the losses of the two steps and the users of each step, with its epoch.
    """
    config = make_config(store, mesh.world_size, **options)
    source, state = new_run(mesh, config)
    state.operative_gin = config.operative_gin()
    first = []
    if load_from is None:
        first = list(train_steps(mesh, config, source, state, before))
    else:
        load(next(load_from.iterdir()), state, mesh)
    tensors = consolidated(state, mesh)
    save(save_to, state, mesh)
    last = list(train_steps(mesh, config, source, state, 2))
    losses = [float(step.loss) for step in last]
    users = [users_of(step, mesh) for step in first + last]
    return {"tensors": tensors, "losses": losses, "users": users} if mesh.is_main else {}


def users_of(step: StepResult, mesh: Mesh) -> tuple[int, list[int]]:
    """The epoch and all ranks' users of a step."""
    assert step.batch.position is not None
    users = [int(user) for user in step.batch.user_ids if user >= 0]
    return step.batch.position.epoch, sorted(user for rank in gather_objects(users, mesh.world_group) for user in rank)


@pytest.fixture(scope="module")
def hops(tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What each hop found, saved and trained."""
    directory = tmp_path_factory.mktemp("chain")
    write_store(directory / "store")
    results: list[dict[str, Any]] = []
    path = None
    for hop, launch in enumerate(HOPS):
        target = directory / str(hop)
        cases = {
            name: partial(
                take_a_hop,
                store=str(directory / "store"),
                load_from=path and path / name,
                save_to=target / name,
                **options_at(hop, case),
            )
            for name, case in CASES.items()
        }
        results.append(run_cases(replace(launch, timeout_s=300), cases)[0])
        path = target
    return results


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_weights_and_states_are_bit_equal_after_every_hop(hops: Any, case: str) -> None:
    start = hops[0][case]["tensors"]
    assert any(name.startswith("optimizer.tables.") for name in start) == (not case.startswith(("sgd", "momentum")))
    assert len(start["model.tables.age_table"]) == 7
    for hop in hops[1:]:
        assert hop[case]["tensors"].keys() == start.keys()
        for name, values in start.items():
            assert hop[case]["tensors"][name] == values, name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_next_losses_are_those_of_the_run_that_was_never_moved(hops: Any, case: str) -> None:
    expected = hops[0][case]["losses"]
    assert expected[0] != expected[1]
    for number, hop in enumerate(hops):
        losses = hop[case]["losses"]
        # Replicated tables have torch's Adam, which moves all rows; sharded ones move the rows that were looked up.
        same_update = case != "adam, moves" or MOVES[number] in (MOVES[0], MOVES[-1])
        count = 2 if same_update else 1
        np.testing.assert_allclose(losses[:count], expected[:count], rtol=1e-5, err_msg=f"hop {number}")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_rest_of_the_epoch_is_what_was_not_seen(hops: Any, case: str) -> None:
    start = hops[0][case]["users"]
    before, (epoch, following) = start[:-2], start[-2]
    seen = [user for epoch_of_step, users in before for user in users if epoch_of_step == epoch]
    samples = SAMPLES[CASES[case].get("task", "ranking")]
    assert seen and sorted(seen + following) == sorted(set(seen + following)) and len(seen + following) == samples
    for hop in hops[1:]:
        assert hop[case]["users"] == start[-2:]

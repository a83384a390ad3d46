from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pytest
import torch

from hstu.checkpoint.directory import MANIFEST, CheckpointFailure
from hstu.checkpoint.load import load
from hstu.checkpoint.save import save
from hstu.parallel.mesh import Mesh
from tests.distributed.launch import Launch, run_cases
from tests.distributed.toy import ToyOptions, full_tables, new_state, train_state

CASES: dict[str, Any] = {
    "sgd": {"optimizer": "sgd", "dropout": 0.3, "optimizer_args": {"momentum": 0.9}},
    "mixed, dropout": {
        "optimizer": "adam",
        "sharding": "column_wise",
        "dropout": 0.3,
        "trained": {"user": {"optimizer_str": "adagrad", "learning_rate": 0.05}, "action": {"optimizer_str": "sgd"}},
        "parts": [{"regex": "head", "optimizer_str": "sgd"}, {"regex": "norm", "learning_rate": 0.02}],
        "optimizer_args": {"sparse_max_gradient": 0.01, "ema_decay": 0.9},
    },
    "adagrad": {"optimizer": "adagrad", "sharding": "table_wise"},
    "adam": {"optimizer": "adam"},
    "rowwise_adagrad": {"optimizer": "rowwise_adagrad"},
    "width no multiple of 4": {"optimizer": "adagrad", "dim": 6},
}
ALL = ["user", "item", "action"]
MOVED: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name}, {kind}": (name, CASES[name] | tables)
    for name, kind, tables in (
        ("adagrad", "table_wise", {}),
        ("adagrad", "row_wise", {"sharding": "row_wise"}),
        ("adagrad", "replicated", {"replicated": ALL}),
        ("adam", "row_wise", {}),
        ("adam", "column_wise", {"sharding": "column_wise"}),
        ("rowwise_adagrad", "table_wise", {"sharding": "table_wise"}),
        ("width no multiple of 4", "replicated", {"replicated": ALL}),
        ("width no multiple of 4", "all sharded", {"replicated": [], "sharding": "column_wise"}),
    )
}
"""Case and tables that other ranks load it into. Other ranks draw other dropout, so there is none."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> dict[int, tuple[Path, dict[str, Any]]]:
    """World size → the directory with a checkpoint of each case, and what rank 0 reports."""
    runs = {}
    for size in (1, 2):
        directory = tmp_path_factory.mktemp(f"ranks{size}")
        cases = {name: partial(interrupted_and_not, directory=directory / name, **case) for name, case in CASES.items()}
        runs[size] = (directory, run_cases(Launch(size, timeout_s=100), cases)[0])
    return runs


def interrupted_and_not(mesh: Mesh, directory: Path, **options: Unpack[ToyOptions]) -> dict[str, Any]:
    """Three steps, a checkpoint, two more; the same two in a new model that loads the checkpoint."""
    first = new_state(mesh, **options)
    before = train_state(first, mesh, 3)
    path = save(directory, first, mesh)
    noise_straight_on = torch.rand(3).tolist()
    straight_on = train_state(first, mesh, 2)

    second = new_state(mesh, **options, init_seed_offset=1)
    load(path, second, mesh)
    noise_resumed = torch.rand(3).tolist()
    resumed = train_state(second, mesh, 2)
    return {
        "before": before,
        "straight_on": [straight_on, noise_straight_on, full_tables(first.model, mesh)],
        "resumed": [resumed, noise_resumed, full_tables(second.model, mesh)],
        "position": [second.iteration, second.position.consumed],
        "names": sorted(second.tensors()),
    }


def continue_from(mesh: Mesh, checkpoint: Path, **options: Unpack[ToyOptions]) -> dict[str, Any]:
    """Load a checkpoint on other ranks or in other tables, and train two steps."""
    state = new_state(mesh, **options, init_seed_offset=1)
    load(checkpoint, state, mesh)
    return {"losses": train_state(state, mesh, 2), "tables": full_tables(state.model, mesh)}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(saved: Any, size: int, case: str) -> None:
    result = saved[size][1][case]
    losses, noise, tables = result["straight_on"]
    assert result["resumed"] == [losses, noise, tables]
    assert result["position"] == [5, 60]
    assert losses != result["before"][:2], "the steps after the checkpoint must have something to tell"


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 1), (2, 3)])
def test_a_checkpoint_goes_on_over_other_ranks_and_in_tables_cut_otherwise(
    saved: Any, saved_by: int, loaded_by: int
) -> None:
    directory, results = saved[saved_by]
    cases = {
        name: partial(continue_from, checkpoint=directory / saved_as / "iteration_00000003", **case)
        for name, (saved_as, case) in MOVED.items()
    }
    moved = run_cases(Launch(loaded_by, timeout_s=100), cases)
    for name, (saved_as, _) in MOVED.items():
        losses, _, tables = results[saved_as]["straight_on"]
        np.testing.assert_allclose(moved[0][name]["losses"], losses, rtol=1e-5, err_msg=name)
        for table, rows in tables.items():
            np.testing.assert_allclose(moved[0][name]["tables"][table], rows, rtol=1e-5, atol=2e-6, err_msg=name)


def test_names_do_not_depend_on_wrapping(saved: Any) -> None:
    alone, wrapped = (saved[size][1]["adam"]["names"] for size in (1, 2))
    assert alone == wrapped
    assert {"model.tables.item_table", "model.tables.action_table", "model.task.head.weight"} < set(alone)


def test_a_checkpoint_leaves_no_temporary_files(saved: Any) -> None:
    directory, _ = saved[2]
    assert [path.name for path in (directory / "adam").iterdir()] == ["iteration_00000003"]
    files = {path.name for path in (directory / "adam" / "iteration_00000003").iterdir()}
    assert files == {"tensors", "progress.json", "operative.gin", "rng_rank0.pt", "rng_rank1.pt", MANIFEST}


def error_of_saving(mesh: Mesh, directory: Path) -> str:
    try:
        save(directory, new_state(mesh), mesh)
    except CheckpointFailure as error:
        return str(error)
    return "saved"


def save_thrice(mesh: Mesh, directory: Path) -> list[list[str]]:
    """Save an iteration, the same again, and with other weights; the names in the directory after each."""
    state, names = new_state(mesh), []
    for state.operative_gin in ("first", "second", "third"):
        if state.operative_gin == "third":
            with torch.no_grad():
                next(state.model.dense.parameters()).add_(1)
        save(directory, state, mesh)
        names.append(sorted(f"{path.name} {(path / 'operative.gin').read_text()}" for path in directory.iterdir()))
    return names


def test_saving_where_nothing_can_be_written_fails_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    for messages in run_cases(2, {"save": partial(error_of_saving, directory=tmp_path / "file")}):
        assert "checkpointing failed on rank 0" in messages["save"]


def test_saving_an_iteration_again_overwrites_nothing(tmp_path: Path) -> None:
    name, aside = "iteration_00000000", "set_aside_iteration_00000000_1"
    same_state = [f"{name} first"]
    (names,) = run_cases(1, {"save": partial(save_thrice, directory=tmp_path)})
    assert names["save"] == [same_state, same_state, [f"{name} third", f"{aside} first"]]

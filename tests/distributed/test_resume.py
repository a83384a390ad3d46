"""Checkpoints of the toy: resumed bit for bit, over other ranks and tables, and loaded in part."""

from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pytest
import torch

from hstu.base.errors import DataError
from hstu.checkpoint.directory import MANIFEST, CheckpointFailure
from hstu.checkpoint.load import load
from hstu.checkpoint.matching import LoadOptions, ParamMap
from hstu.parallel.mesh import Mesh
from tests.distributed.launch import Launch, run_cases
from tests.distributed.tensor_cases import consolidated
from tests.distributed.toy import ITEMS, ToyOptions, new_state, save, train_state
from tests.helpers import error_of

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
    "adam, two replicated": {"optimizer": "adam", "replicated": ["action", "user"]},
    "rowwise_adagrad": {"optimizer": "rowwise_adagrad"},
    "width no multiple of 4": {"optimizer": "adagrad", "dim": 6},
    "partial_rowwise_adam": {"optimizer": "partial_rowwise_adam"},
    "muon": {"optimizer": "muon", "optimizer_args": {"weight_decay": 0.1}},
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
        ("partial_rowwise_adam", "replicated", {"replicated": ALL}),
        ("partial_rowwise_adam", "table_wise", {"sharding": "table_wise"}),
        ("muon", "table_wise", {"sharding": "table_wise"}),
        ("width no multiple of 4", "replicated", {"replicated": ALL}),
        ("width no multiple of 4", "all sharded", {"replicated": [], "sharding": "column_wise"}),
    )
}
"""Case and tables that other ranks load it into. Other ranks draw other dropout, so there is none."""


LENIENT = LoadOptions(strict=False)
GROWN = ITEMS + 9
RENAMED = {"item_table": "goods"}
GOODS = ParamMap({"model.tables.goods": "model.tables.item_table"})
WARES = ParamMap({"model.tables.wares": "model.tables.item_table"})
PARTS: dict[str, Any] = {
    "weights alone": {"optimizer": "adagrad", "load_options": LoadOptions(optimizer=False)},
    "another optimizer": {"optimizer": "adagrad"},
    "another optimizer, lenient": {"optimizer": "adagrad", "load_options": LENIENT},
    "grown": {"items": GROWN},
    "grown, lenient": {"items": GROWN, "load_options": LENIENT, "sharding": "column_wise"},
    "wider, lenient": {"dim": 12, "load_options": LENIENT},
    "renamed": {**RENAMED, "load_options": LoadOptions(param_map=GOODS)},
    "renamed, no map": RENAMED,
    "bad map": {"load_options": LoadOptions(strict=False, param_map=WARES)},
}
"""What two ranks load of the checkpoint of one rank of the case "adam, two replicated"."""


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
    path, saved = save(directory, first, mesh), consolidated(first, mesh)
    noise = torch.rand(3).tolist()
    straight_on = {"losses": train_state(first, mesh, 2), "noise": noise, "tensors": consolidated(first, mesh)}
    return {
        "before": before,
        "saved": saved,
        "straight on": straight_on,
        "resumed": continue_from(mesh, path, **options),
    }


def continue_from(mesh: Mesh, checkpoint: Path, **options: Unpack[ToyOptions]) -> dict[str, Any]:
    """Load a checkpoint into a model with other weights, perhaps on other ranks or in other tables; two steps more."""
    options.setdefault("init_seed_offset", 1)
    state = new_state(mesh, **options)
    load(checkpoint, state, mesh)
    assert (state.iteration, state.position.consumed, state.optimizers.tables.steps) == (3, 36, 3)
    noise = torch.rand(3).tolist()
    return {"losses": train_state(state, mesh, 2), "noise": noise, "tensors": consolidated(state, mesh)}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(saved: Any, size: int, case: str) -> None:
    result = saved[size][1][case]
    assert result["resumed"] == result["straight on"]
    assert result["straight on"]["losses"] != result["before"][:2], "the steps after the checkpoint learn something"


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
        expected, found = results[saved_as]["straight on"], moved[0][name]
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5, err_msg=name)
        for weight in (key for key in expected["tensors"] if key.startswith("model.")):
            np.testing.assert_allclose(
                found["tensors"][weight], expected["tensors"][weight], rtol=1e-5, atol=2e-6, err_msg=f"{name}, {weight}"
            )


def test_a_checkpoint_leaves_no_temporary_files(saved: Any) -> None:
    directory, _ = saved[2]
    assert [path.name for path in (directory / "adam").iterdir()] == ["iteration_00000003"]
    files = {path.name for path in (directory / "adam" / "iteration_00000003").iterdir()}
    assert files == {"tensors", "progress.json", "operative.gin", "rng_rank0.pt", "rng_rank1.pt", MANIFEST}


def error_of_saving(mesh: Mesh, directory: Path) -> str:
    return error_of(lambda: save(directory, new_state(mesh), mesh), CheckpointFailure)


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


@pytest.fixture(scope="module")
def loaded(saved: Any) -> dict[str, Any]:
    name = "adam, two replicated"
    path = saved[1][0] / name / "iteration_00000003"
    cases = {part: partial(load_in_part, checkpoint=path, **CASES[name] | case) for part, case in PARTS.items()}
    return run_cases(Launch(2, timeout_s=100), cases)[0]


@pytest.fixture(scope="module")
def stored(saved: Any) -> dict[str, Any]:
    """Name → values in the checkpoint that is loaded in part."""
    tensors: dict[str, Any] = saved[1][1]["adam, two replicated"]["saved"]
    return tensors


def load_in_part(
    mesh: Mesh, checkpoint: Path, load_options: LoadOptions | None = None, **options: Unpack[ToyOptions]
) -> dict[str, Any]:
    """What the state held before and after loading, the report or the error, and the losses of two steps more."""
    options["init_seed_offset"] = 1
    state = new_state(mesh, **options)
    before = consolidated(state, mesh)
    try:
        report = load(checkpoint, state, mesh, load_options or LoadOptions())
    except DataError as error:
        report = [str(error)]
    after = consolidated(state, mesh)
    position = [state.iteration, state.position.consumed, state.optimizers.tables.steps]
    losses = train_state(state, mesh, 2)
    return {"before": before, "after": after, "report": report, "position": position, "losses": losses}


def test_weights_alone_start_at_iteration_zero_with_fresh_states(stored: Any, loaded: Any) -> None:
    result = loaded["weights alone"]
    assert (result["position"], result["report"]) == ([0, 0, 0], [])
    for name, values in result["after"].items():
        assert values == (stored if name.startswith("model.") else result["before"])[name], name


def test_states_of_another_optimizer_are_refused(loaded: Any) -> None:
    (message,) = loaded["another optimizer"]["report"]
    assert "optimizer.tables.item_table.sum is not in the checkpoint" in message
    assert "ckpt_load_optimizer = False" in message
    assert loaded["another optimizer"]["after"] == loaded["another optimizer"]["before"]


def test_a_lenient_load_reports_what_did_not_fit(stored: Any, loaded: Any) -> None:
    result = loaded["another optimizer, lenient"]
    assert "optimizer.tables.item_table.sum is not in the checkpoint: as initialised" in result["report"]
    assert "optimizer.tables.item_table.exp_avg is in the checkpoint only: not read" in result["report"]
    assert result["position"] == [3, 36, 3]
    assert result["after"]["model.task.head.weight"] == stored["model.task.head.weight"]


def test_a_grown_vocabulary_keeps_its_rows(saved: Any, stored: Any, loaded: Any) -> None:
    result = loaded["grown, lenient"]
    for name in ("model.tables.item_table", "optimizer.tables.item_table.exp_avg"):
        rows = result["after"][name]
        assert rows[:ITEMS] == stored[name]
        assert rows[ITEMS:] == result["before"][name][ITEMS:]
        size = f"{name} is ({ITEMS}, 8) in the checkpoint, ({GROWN}, 8) in this run"
        assert f"{size}: the first {ITEMS} rows read" in result["report"]
    straight_on = saved[1][1]["adam, two replicated"]["straight on"]
    np.testing.assert_allclose(result["losses"], straight_on["losses"], rtol=1e-5)


def test_a_grown_vocabulary_is_refused_unless_asked_for(loaded: Any) -> None:
    (message,) = loaded["grown"]["report"]
    assert f"model.tables.item_table is ({ITEMS}, 8) in the checkpoint, ({GROWN}, 8) in this run" in message
    assert "ckpt_load_strict = False" in message


def test_what_has_another_width_stays_as_initialised(loaded: Any) -> None:
    result = loaded["wider, lenient"]
    line = f"model.tables.item_table is ({ITEMS}, 8) in the checkpoint, ({ITEMS}, 12) in this run: as initialised"
    assert line in result["report"]
    assert result["after"]["model.tables.item_table"] == result["before"]["model.tables.item_table"]


def test_a_renamed_table_brings_its_states(stored: Any, loaded: Any) -> None:
    result = loaded["renamed"]
    assert result["report"] == []
    for state in ("model.tables.{}", "optimizer.tables.{}.exp_avg", "optimizer.tables.{}.exp_avg_sq"):
        assert result["after"][state.format("goods")] == stored[state.format("item_table")]
    assert "model.tables.goods is not in the checkpoint" in loaded["renamed, no map"]["report"][0]


def test_a_map_with_unknown_names_is_an_error_however_lenient(loaded: Any) -> None:
    assert "model.tables.wares is not a weight of this run" in loaded["bad map"]["report"][0]

"""Loading a part of a checkpoint: weights alone, under other names, into a grown vocabulary."""

from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pytest

from hstu.base.errors import DataError
from hstu.checkpoint.load import load
from hstu.checkpoint.matching import LoadOptions, ParamMap
from hstu.checkpoint.save import save
from hstu.parallel.mesh import Mesh
from tests.distributed.launch import Launch, run_cases
from tests.distributed.tensor_cases import consolidated
from tests.distributed.toy import ITEMS, ToyOptions, new_state, train_state

SAVED: ToyOptions = {"optimizer": "adam", "replicated": ["action", "user"]}
LENIENT = LoadOptions(strict=False)
GROWN = ITEMS + 9
RENAMED = {"item_table": "goods"}
GOODS = ParamMap({"model.tables.goods": "model.tables.item_table"})
WARES = ParamMap({"model.tables.wares": "model.tables.item_table"})
CASES: dict[str, Any] = {
    "whole": {},
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("saved")
    (results,) = run_cases(1, {"save": partial(save_after_three_steps, directory=directory, **SAVED)})
    return directory / "iteration_00000003", results["save"]


def save_after_three_steps(mesh: Mesh, directory: Path, **options: Unpack[ToyOptions]) -> dict[str, Any]:
    """The weights and states, and the loss of the next step."""
    state = new_state(mesh, **options)
    train_state(state, mesh, 3)
    save(directory, state, mesh)
    return {"tensors": consolidated(state, mesh), "next_losses": train_state(state, mesh, 1)}


@pytest.fixture(scope="module")
def loaded(saved: Any) -> dict[str, Any]:
    """All cases on two ranks. One rank has saved the checkpoint."""
    cases = {name: partial(load_in_part, checkpoint=saved[0], **{**SAVED, **case}) for name, case in CASES.items()}
    return run_cases(Launch(2, timeout_s=100), cases)[0]


def load_in_part(
    mesh: Mesh, checkpoint: Path, load_options: LoadOptions | None = None, **options: Unpack[ToyOptions]
) -> dict[str, Any]:
    """What the state held before and after loading, the report or the error, and the loss of the next step."""
    state = new_state(mesh, **options, init_seed_offset=1)
    before = consolidated(state, mesh)
    try:
        report = load(checkpoint, state, mesh, load_options or LoadOptions())
    except DataError as error:
        report = [str(error)]
    after = consolidated(state, mesh)
    position = [state.iteration, state.position.consumed, state.optimizers.tables.steps]
    losses = train_state(state, mesh, 1)
    return {"before": before, "after": after, "report": report, "position": position, "losses": losses}


def test_all_of_it_arrives_where_everything_fits(saved: Any, loaded: Any) -> None:
    case = loaded["whole"]
    assert case["after"] == saved[1]["tensors"] != case["before"]
    assert (case["position"], case["report"]) == ([3, 36, 3], [])
    np.testing.assert_allclose(case["losses"], saved[1]["next_losses"], rtol=1e-5)


def test_weights_alone_start_at_iteration_zero_with_fresh_states(saved: Any, loaded: Any) -> None:
    result = loaded["weights alone"]
    assert (result["position"], result["report"]) == ([0, 0, 0], [])
    for name, values in result["after"].items():
        assert values == (saved[1]["tensors"] if name.startswith("model.") else result["before"])[name], name


def test_states_of_another_optimizer_are_refused(loaded: Any) -> None:
    (message,) = loaded["another optimizer"]["report"]
    assert "optimizer.tables.item_table.sum is not in the checkpoint" in message
    assert "ckpt_load_optimizer = False" in message
    assert loaded["another optimizer"]["after"] == loaded["another optimizer"]["before"]


def test_a_lenient_load_reports_what_did_not_fit(saved: Any, loaded: Any) -> None:
    result = loaded["another optimizer, lenient"]
    assert "optimizer.tables.item_table.sum is not in the checkpoint: as initialised" in result["report"]
    assert "optimizer.tables.item_table.exp_avg is in the checkpoint only: not read" in result["report"]
    assert result["position"] == [3, 36, 3]
    assert result["after"]["model.task.head.weight"] == saved[1]["tensors"]["model.task.head.weight"]


def test_a_grown_vocabulary_keeps_its_rows(saved: Any, loaded: Any) -> None:
    result = loaded["grown, lenient"]
    for name in ("model.tables.item_table", "optimizer.tables.item_table.exp_avg"):
        rows = result["after"][name]
        assert rows[:ITEMS] == saved[1]["tensors"][name]
        assert rows[ITEMS:] == result["before"][name][ITEMS:]
        size = f"{name} is ({ITEMS}, 8) in the checkpoint, ({GROWN}, 8) in this run"
        assert f"{size}: the first {ITEMS} rows read" in result["report"]
    np.testing.assert_allclose(result["losses"], saved[1]["next_losses"], rtol=1e-5)


def test_a_grown_vocabulary_is_refused_unless_asked_for(loaded: Any) -> None:
    (message,) = loaded["grown"]["report"]
    assert f"model.tables.item_table is ({ITEMS}, 8) in the checkpoint, ({GROWN}, 8) in this run" in message
    assert "ckpt_load_strict = False" in message


def test_what_has_another_width_stays_as_initialised(loaded: Any) -> None:
    result = loaded["wider, lenient"]
    line = f"model.tables.item_table is ({ITEMS}, 8) in the checkpoint, ({ITEMS}, 12) in this run: as initialised"
    assert line in result["report"]
    assert result["after"]["model.tables.item_table"] == result["before"]["model.tables.item_table"]


def test_a_renamed_table_brings_its_states(saved: Any, loaded: Any) -> None:
    result = loaded["renamed"]
    assert result["report"] == []
    for state in ("model.tables.{}", "optimizer.tables.{}.exp_avg", "optimizer.tables.{}.exp_avg_sq"):
        assert result["after"][state.format("goods")] == saved[1]["tensors"][state.format("item_table")]
    assert "model.tables.goods is not in the checkpoint" in loaded["renamed, no map"]["report"][0]


def test_a_map_with_unknown_names_is_an_error_however_lenient(loaded: Any) -> None:
    assert "model.tables.wares is not a weight of this run" in loaded["bad map"]["report"][0]

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Size

from hstu.checkpoint.architecture import differences
from hstu.checkpoint.match import LoadOptions, match
from hstu.checkpoint.names import join, split
from hstu.checkpoint.param_map import ParamMap
from hstu.checkpoint.row_ids import MovedRows, moved_rows
from hstu.config.errors import DataError

WEIGHTS_ALONE = LoadOptions(optimizer=False)


@pytest.mark.parametrize(
    ("name", "weight", "state"),
    [
        ("model.task.head.bias", "model.task.head.bias", ""),
        ("model.tables.a.b", "model.tables.a.b", ""),
        ("optimizer.tables.a.b.exp_avg", "model.tables.a.b", "exp_avg"),
        ("optimizer.dense.task.head.bias.step", "model.task.head.bias", "step"),
    ],
)
def test_a_state_is_known_by_its_weight(name: str, weight: str, state: str) -> None:
    assert split(name) == (weight, state)
    assert join(weight, state) == name


def read_map(tmp_path: Path, text: str) -> ParamMap:
    (tmp_path / "map.txt").write_text(text)
    return ParamMap.read(tmp_path / "map.txt")


def test_the_longest_entry_renames_a_weight_and_its_states(tmp_path: Path) -> None:
    renamed = read_map(
        tmp_path,
        "# new, then old\nmodel.task.stack model.task.layers\n\nmodel.task.stack.2\tmodel.task.layers.1  # copied\n",
    )
    assert renamed.stored_name("model.task.stack.0.bias") == "model.task.layers.0.bias"
    assert renamed.stored_name("model.task.stack.2.bias") == "model.task.layers.1.bias"
    assert renamed.stored_name("optimizer.dense.task.stack.2.bias.step") == "optimizer.dense.task.layers.1.bias.step"
    assert renamed.stored_name("model.task.stack2.bias") == "model.task.stack2.bias"


@pytest.mark.parametrize(
    "line", ["model.a", "model.a model.b model.c", "tables.a tables.b", "model.a model.b\nmodel.a model.c"]
)
def test_a_bad_line_of_a_map_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"map\.txt:\d: .*expected two names of weights"):
        read_map(tmp_path, line)
    with pytest.raises(DataError, match=r"ckpt_param_map: .*absent"):
        ParamMap.read(tmp_path / "absent")


def test_one_tensor_may_be_read_into_two() -> None:
    options = LoadOptions(renamed=ParamMap({"model.b": "model.a"}))
    found = match({"model.a": Size([2]), "model.b": Size([2])}, {"model.a": Size([2])}, options)
    assert found.stored_names == {"model.a": "model.a", "model.b": "model.a"}
    assert found.problems() == []


def test_rows_are_common_to_tables_of_one_width_alone() -> None:
    own = {"model.tables.t": Size([9, 4]), "optimizer.tables.t.sum": Size([9, 4]), "model.task.w": Size([9, 4])}
    stored = {"model.tables.t": Size([7, 4]), "optimizer.tables.t.sum": Size([7, 3]), "model.task.w": Size([7, 4])}
    found = match(own, stored, LoadOptions())
    assert found.stored_names == {"model.tables.t": "model.tables.t"}
    assert [entry.common_rows for entry in found.resized] == [7, 0, 0]


def test_an_average_comes_with_the_weights_and_begins_at_them() -> None:
    own = {name: Size([3]) for name in ("model.task.w", "optimizer.dense.task.w.average", "optimizer.dense.task.w.sum")}
    kept = match(own, {**own}, WEIGHTS_ALONE)
    assert list(kept.stored_names) == ["model.task.w", "optimizer.dense.task.w.average"]
    begun = match(own, {"model.task.w": Size([3])}, WEIGHTS_ALONE)
    assert begun.stored_names == dict.fromkeys(["model.task.w", "optimizer.dense.task.w.average"], "model.task.w")
    dropped = match({"model.task.w": Size([3])}, own, WEIGHTS_ALONE)
    assert dropped.problems() == [] and match({"model.task.w": Size([3])}, own, LoadOptions()).unexpected


GIN = """
NetworkArgs.num_layers = 2
NetworkArgs.hidden_dropout = 0.2
TrainerArgs.seed = 1
item/EmbeddingArgs.feature_names = ['item']
OptimizerArgs.optimizer_str = 'adam'
"""


def test_the_lines_that_differ_are_told_apart_by_what_they_mean() -> None:
    other = GIN.replace("= 2", "= 3").replace("0.2", "0.1").replace("'adam'", "'sgd'").replace("seed = 1", "seed = 4")
    found = differences(GIN, other)
    assert str(found[0]) == "NetworkArgs.num_layers = 2 in the checkpoint, 3 in this run"
    assert [entry.name for entry in found if entry.is_of_network] == ["NetworkArgs.num_layers"]
    assert [entry.name for entry in found if entry.shapes_tensors] == [
        "NetworkArgs.num_layers",
        "OptimizerArgs.optimizer_str",
    ]
    assert len(found) == 4
    (added,) = differences(GIN.replace("item/EmbeddingArgs.feature_names = ['item']\n", ""), GIN)
    assert str(added) == "item/EmbeddingArgs.feature_names = nothing in the checkpoint, ['item'] in this run"
    assert added.shapes_tensors and not added.is_of_network


def test_moved_rows_are_no_matter_of_size() -> None:
    own = {"model.tables.t": Size([3, 4]), "optimizer.tables.t.sum": Size([3, 4]), "model.tables.u": Size([3, 4])}
    stored = {name: Size([2, *size[1:]]) for name, size in own.items()} | {"ids.item": Size([2])}
    moved = {"model.tables.t": MovedRows(np.array([0, -1, 1])), "model.tables.u": MovedRows(None)}
    found = match(own, stored, LoadOptions(), moved)
    assert set(found.stored_names) == {"model.tables.t", "optimizer.tables.t.sum"}
    assert found.resized == () and len(found.problems()) == 2
    told = found.report([])
    assert "model.tables.t and its states: 2 of 3 rows read, by raw id, the others as initialised" in told
    assert "model.tables.u and its states: as initialised: which row was whose cannot be told" in told


def tensors(*ids: object) -> tuple[torch.Tensor, ...]:
    if isinstance(ids[0], int):
        return (torch.tensor(ids, dtype=torch.int64),)
    encoded = [str(text).encode() for text in ids]
    offsets = np.cumsum([0, *map(len, encoded)])
    return torch.from_numpy(offsets), torch.tensor(list(b"".join(encoded)), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("own", "stored", "places"),
    [
        (tensors(3, 5, 9), tensors(3, 9), [0, -1, 1, -1]),
        (tensors(3, 5), tensors(4, 6, 7), [-1, -1, -1, -1]),
        (tensors("a", "bb", "z"), tensors("bb", "c", "z"), [-1, 0, 2, -1]),
        (tensors(1, 2), tensors("a", "b"), None),
        (tensors(1, 2, 3, 4, 5), tensors(1, 2), None),  # hashed into four rows
    ],
)
def test_rows_are_found_by_their_raw_ids(own: Any, stored: Any, places: list[int] | None) -> None:
    found = moved_rows(4, [own], [stored])
    assert found is not None
    assert (None if found.places is None else found.places.tolist()) == places
    assert moved_rows(4, [own], [own]) is None
    assert moved_rows(4, [own], [None]) is None
    shared = moved_rows(4, [own, own], [own, stored])
    assert shared is not None and shared.places is None

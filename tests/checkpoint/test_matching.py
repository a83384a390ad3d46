from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Size

from hstu.base.errors import DataError
from hstu.checkpoint.matching import LoadOptions, ParamMap, config_differences, match_tensors
from hstu.checkpoint.raw_ids import RowRemap, remap_rows
from hstu.checkpoint.tensors import join_name, split_name

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
def test_names_split_into_weight_and_state(name: str, weight: str, state: str) -> None:
    assert split_name(name) == (weight, state)
    assert join_name(weight, state) == name


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
    options = LoadOptions(param_map=ParamMap({"model.b": "model.a"}))
    found = match_tensors({"model.a": Size([2]), "model.b": Size([2])}, {"model.a": Size([2])}, options)
    assert found.stored_names == {"model.a": "model.a", "model.b": "model.a"}
    assert found.problems() == []


def test_only_tables_of_equal_width_share_rows() -> None:
    own = {"model.tables.t": Size([9, 4]), "optimizer.tables.t.sum": Size([9, 4]), "model.task.w": Size([9, 4])}
    stored = {"model.tables.t": Size([7, 4]), "optimizer.tables.t.sum": Size([7, 3]), "model.task.w": Size([7, 4])}
    found = match_tensors(own, stored, LoadOptions())
    assert found.stored_names == {"model.tables.t": "model.tables.t"}
    assert [entry.common_rows for entry in found.resized] == [7, 0, 0]


def test_averages_load_with_the_weights_or_start_from_them() -> None:
    own = {name: Size([3]) for name in ("model.task.w", "optimizer.dense.task.w.average", "optimizer.dense.task.w.sum")}
    kept = match_tensors(own, {**own}, WEIGHTS_ALONE)
    assert list(kept.stored_names) == ["model.task.w", "optimizer.dense.task.w.average"]
    begun = match_tensors(own, {"model.task.w": Size([3])}, WEIGHTS_ALONE)
    assert begun.stored_names == dict.fromkeys(["model.task.w", "optimizer.dense.task.w.average"], "model.task.w")
    dropped = match_tensors({"model.task.w": Size([3])}, own, WEIGHTS_ALONE)
    assert dropped.problems() == [] and match_tensors({"model.task.w": Size([3])}, own, LoadOptions()).unexpected


GIN = """
NetworkArgs.num_layers = 2
NetworkArgs.hidden_dropout = 0.2
TrainerArgs.seed = 1
item/EmbeddingArgs.feature_names = ['item']
OptimizerArgs.optimizer_str = 'adam'
"""


def test_config_differences_are_classified() -> None:
    other = GIN.replace("= 2", "= 3").replace("0.2", "0.1").replace("'adam'", "'sgd'").replace("seed = 1", "seed = 4")
    found = config_differences(GIN, other)
    assert str(found[0]) == "NetworkArgs.num_layers = 2 in the checkpoint, 3 in this run"
    assert [entry.name for entry in found if entry.changes == "model"] == ["NetworkArgs.num_layers"]
    assert [entry.name for entry in found if entry.changes in ("model", "tensors")] == [
        "NetworkArgs.num_layers",
        "OptimizerArgs.optimizer_str",
    ]
    assert len(found) == 4
    (added,) = config_differences(GIN.replace("item/EmbeddingArgs.feature_names = ['item']\n", ""), GIN)
    assert str(added) == "item/EmbeddingArgs.feature_names = nothing in the checkpoint, ['item'] in this run"
    assert added.changes == "tensors"


def test_remapped_rows_may_have_another_number_of_rows() -> None:
    own = {"model.tables.t": Size([3, 4]), "optimizer.tables.t.sum": Size([3, 4]), "model.tables.u": Size([3, 4])}
    stored = {name: Size([2, *size[1:]]) for name, size in own.items()} | {"ids.item": Size([2])}
    remaps = {"model.tables.t": RowRemap(np.array([0, -1, 1])), "model.tables.u": RowRemap(None)}
    found = match_tensors(own, stored, LoadOptions(), remaps)
    assert set(found.stored_names) == {"model.tables.t", "optimizer.tables.t.sum"}
    assert found.resized == [] and len(found.problems()) == 2
    told = found.report([])
    assert "model.tables.t and its states: 2 of 3 rows read, by raw id, the others as initialised" in told
    assert "model.tables.u and its states: as initialised: it is unknown which row belonged to which id" in told


def tensors(*ids: object) -> tuple[torch.Tensor, ...]:
    if isinstance(ids[0], int):
        return (torch.tensor(ids, dtype=torch.int64),)
    encoded = [str(text).encode() for text in ids]
    offsets = np.cumsum([0, *map(len, encoded)])
    return torch.from_numpy(offsets), torch.tensor(list(b"".join(encoded)), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("own", "stored", "source_rows"),
    [
        (tensors(3, 5, 9), tensors(3, 9), [0, -1, 1, -1]),
        (tensors(3, 5), tensors(4, 6, 7), [-1, -1, -1, -1]),
        (tensors("a", "bb", "z"), tensors("bb", "c", "z"), [-1, 0, 2, -1]),
        (tensors(1, 2), tensors("a", "b"), None),
        (tensors(1, 2, 3, 4, 5), tensors(1, 2), None),  # hashed into four rows
    ],
)
def test_rows_are_found_by_their_raw_ids(own: Any, stored: Any, source_rows: list[int] | None) -> None:
    found = remap_rows(4, [own], [stored])
    assert found is not None
    assert (None if found.source_rows is None else found.source_rows.tolist()) == source_rows
    assert remap_rows(4, [own], [own]) is None
    assert remap_rows(4, [own], [None]) is None
    shared = remap_rows(4, [own, own], [own, stored])
    assert shared is not None and shared.source_rows is None


def test_a_parameter_that_an_older_program_did_not_write_has_its_default() -> None:
    older = GIN.replace("TrainerArgs.seed = 1\n", "")
    assert config_differences(older, GIN.replace("seed = 1", "seed = 1234")) == []
    (changed,) = config_differences(older, GIN)
    assert str(changed) == "TrainerArgs.seed = 1234 in the checkpoint, 1 in this run"
    leaking = GIN + "NetworkArgs.strict_kernel_backend = True\n"
    assert [(entry.name, entry.changes == "model") for entry in config_differences(GIN, leaking)] == [
        ("NetworkArgs.strict_kernel_backend", False)
    ]


def test_another_kind_of_task_is_another_model_and_another_loss_is_not() -> None:
    stored = "click/RankingTaskArgs.kind = 'binary'\nclick/RankingTaskArgs.loss = 'bce'\n"
    own = stored.replace("binary", "regression").replace("bce", "focal")
    assert [(entry.name, entry.changes == "model") for entry in config_differences(stored, own)] == [
        ("click/RankingTaskArgs.kind", True),
        ("click/RankingTaskArgs.loss", False),
    ]
    (older,) = config_differences(
        "RankingArgs.num_tasks = 1\n", "RankingArgs.num_tasks = 1\nRankingArgs.num_experts = 2\n"
    )
    assert older.changes == "model"


def test_two_ways_to_write_a_value_are_no_difference() -> None:
    stored = "NetworkArgs.position_encoding = 'absolute'\nOptimizerArgs.learning_rate = 1\n"
    own = "NetworkArgs.position_encoding = ('absolute',)\nOptimizerArgs.learning_rate = 1.0\n"
    assert config_differences(stored, own) == []
    (difference,) = config_differences(stored, own.replace("('absolute',)", "('absolute', 'relative_bias')"))
    assert difference.changes == "model"

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hstu.base.errors import DataError
from hstu.checkpoint.directory import DamagedCheckpoint, describe_files, write_manifest
from hstu.checkpoint.export import create_safetensors
from hstu.checkpoint.tensors import load_safetensors, read_metadata

TENSORS = {
    "flag": torch.tensor([True, False, True]),
    "step": torch.tensor(7, dtype=torch.int64),
    "table": torch.arange(15.0).reshape(5, 3),
    "half": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "nothing": torch.empty(0, 4),
}


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    sizes = {name: (tensor.size(), tensor.dtype) for name, tensor in tensors.items()}
    for name, tensor in create_safetensors(path, sizes).items():
        tensor.copy_(tensors[name])


assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def test_tensors_are_read_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "a", TENSORS)
    assert_same(load_safetensors(tmp_path / "a"), TENSORS)
    write(tmp_path / "b", {"nothing": torch.empty(0)})
    assert_same(load_safetensors(tmp_path / "b"), {"nothing": torch.empty(0)})


def test_writing_to_loaded_tensors_does_not_change_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a", TENSORS)
    load_safetensors(tmp_path / "a")["table"].zero_()
    assert_same(load_safetensors(tmp_path / "a"), TENSORS)


def test_the_library_reads_created_files_and_its_own_files_load(tmp_path: Path) -> None:
    write(tmp_path / "created", TENSORS)
    assert_same(load_file(tmp_path / "created"), TENSORS)
    save_file(TENSORS, tmp_path / "saved")
    assert_same(load_safetensors(tmp_path / "saved"), TENSORS)


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_file_or_one_of_another_format_is_an_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a"
    write(path, TENSORS)
    content = {"cut": path.read_bytes()[:-1], "text": b"this is a text, not a model", "empty": b""}[damage]
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not a safetensors file, or it is damaged"):
        load_safetensors(path)


PROGRESS: dict[str, Any] = {
    "iteration": 4,
    "position": {"epoch": 1, "consumed": 8},
    "optimizer": {"table_steps": 4, "lr_multiplier": 1.0},
    "tables": {"item": {"rows": 3, "dim": 16, "features": ["item_id"]}},
    "features": {},
    "carried": {"history": {"last": [], "count": {"valid": 1}, "extremes": {}}},
    "world_size": 1,
}


def stored(root: Path, progress: Any) -> dict[str, Any]:
    """The metadata of a checkpoint with this progress.json, as read again."""
    (root / "progress.json").write_text(json.dumps(progress))
    write_manifest(root, describe_files(root, [root / "progress.json"]))
    return read_metadata(root)


def test_what_a_run_writes_is_read(tmp_path: Path) -> None:
    assert stored(tmp_path, PROGRESS) == PROGRESS


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"iteration": -1}, "it.iteration is -1"),
        ({"tables": {"item": None}}, "it.tables.item is None"),
        ({"tables": {"item": {"rows": 10**30, "dim": 16, "features": []}}}, "it.tables.item.rows is 1000"),
        ({"tables": {"item": {"rows": 3, "dim": 16, "features": [4]}}}, r"it.tables.item.features\[0\] is 4"),
        ({"features": {"item": "item_id"}}, "it.features has no 'cardinalities'"),
        ({"carried": {"history": {"last": [7], "count": {}, "extremes": {}}}}, r"it.carried.history.last\[0\] is 7"),
        ({"position": []}, r"it.position is \[\]"),
        ({"trained_on": "x"}, "it.trained_on is 'x'"),
    ],
)
def test_a_part_of_another_shape_is_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DamagedCheckpoint, match=rf"progress.json is damaged \({message}.*Load another checkpoint"):
        stored(tmp_path, PROGRESS | changed)

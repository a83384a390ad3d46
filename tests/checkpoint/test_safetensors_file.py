from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hstu.checkpoint.safetensors_file import create_file, open_file
from hstu.config.errors import DataError

TENSORS = {
    "flag": torch.tensor([True, False, True]),
    "step": torch.tensor(7, dtype=torch.int64),
    "table": torch.arange(15.0).reshape(5, 3),
    "half": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    "nothing": torch.empty(0, 4),
}


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    sizes = {name: (tensor.size(), tensor.dtype) for name, tensor in tensors.items()}
    for name, tensor in create_file(path, sizes, {"format": "pt"}).items():
        tensor.copy_(tensors[name])


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == tensor.dtype and torch.equal(left[name], tensor) for name, tensor in right.items()
    )


def test_tensors_come_back_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "a", TENSORS)
    assert same(open_file(tmp_path / "a"), TENSORS)
    write(tmp_path / "b", {"nothing": torch.empty(0)})
    assert same(open_file(tmp_path / "b"), {"nothing": torch.empty(0)})


def test_what_is_written_into_opened_tensors_does_not_reach_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a", TENSORS)
    open_file(tmp_path / "a")["table"].zero_()
    assert same(open_file(tmp_path / "a"), TENSORS)


def test_the_package_reads_our_files_and_we_read_its(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.torch", reason="the package safetensors is not installed")
    write(tmp_path / "ours", TENSORS)
    assert same(package.load_file(tmp_path / "ours"), TENSORS)
    package.save_file(TENSORS, tmp_path / "theirs")
    assert same(open_file(tmp_path / "theirs"), TENSORS)


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_another_or_a_damaged_file_is_an_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a"
    write(path, TENSORS)
    content = {"cut": path.read_bytes()[:-1], "text": b"this is a text and no model", "empty": b""}[damage]
    path.write_bytes(content)
    with pytest.raises(DataError, match="no safetensors file, or damaged"):
        open_file(path)

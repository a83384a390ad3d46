import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hstu.base.errors import DataError
from hstu.checkpoint.export import create_safetensors
from hstu.checkpoint.tensors import load_safetensors

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

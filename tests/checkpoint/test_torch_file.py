from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from hstu.checkpoint.torch_file import system_errors, write_file


@pytest.mark.parametrize("numbers", [1, 10**6])
def test_a_full_disk_is_told_as_such(numbers: int) -> None:
    with pytest.raises(OSError) as raised:
        write_file({"tensor": torch.zeros(numbers)}, Path("/dev/full"))
    assert raised.value.errno == errno.ENOSPC


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_file({"tensor": torch.arange(3)}, tmp_path / "file")
    assert torch.load(tmp_path / "file", weights_only=True)["tensor"].tolist() == [0, 1, 2]


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="a defect"), system_errors():
        raise RuntimeError("a defect")

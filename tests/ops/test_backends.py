"""Falling back is said in one line, or refused."""

from __future__ import annotations

import logging

import pytest
import torch

from hstu.config.errors import ConfigError
from hstu.ops.backends import Backend, select_backend

CPU = torch.device("cpu")


def test_what_was_asked_for_is_used_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    assert select_backend("pytorch", strict=True, device=CPU) is Backend.PYTORCH
    assert not caplog.records


@pytest.mark.parametrize("requested", ["cutlass", "triton"])
def test_a_missing_backend_falls_back_and_says_so_in_one_line(requested: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert select_backend(requested, strict=False, device=CPU) is Backend.PYTORCH
    (record,) = caplog.records
    assert requested in record.message and "pytorch is used" in record.message


def test_a_missing_backend_is_an_error_where_strict() -> None:
    with pytest.raises(ConfigError, match="strict_kernel_backend"):
        select_backend("cutlass", strict=True, device=CPU)

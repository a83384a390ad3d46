"""The device of the tests that are for Triton kernels alone."""

import pytest
import torch

from tests.ops.backends import TRITON, device_of


@pytest.fixture(params=[TRITON], ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, or the CPU where kernels are interpreted; elsewhere the test is skipped."""
    return device_of(request.param)

"""The device of the tests that are for Triton kernels alone."""

import pytest
import torch

from hstu.ops.types import Backend
from tests.ops.backends import INTERPRETED, device_of


@pytest.fixture
def device() -> torch.device:
    """The GPU, or the CPU where kernels are interpreted; else the test is skipped."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("NEEDS AN NVIDIA GPU (test_interpreted.py runs this test on the CPU)")
    return device_of(Backend.TRITON)

"""How kernels run in the tests of a GPU, and the device of tests for Triton kernels alone."""

from collections.abc import Iterator

import pytest
import torch

from tests.ops.backends import ON_A_GPU, TRITON, device_of


@pytest.fixture(autouse=True)
def nan_in_new_tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU, run with deterministic algorithms: new tensors are nan, which exposes what a kernel fails to write."""
    if not ON_A_GPU or request.node.get_closest_marker("gpu") is None:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[TRITON], ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, or the CPU where kernels are interpreted; elsewhere the test is skipped."""
    return device_of(request.param)

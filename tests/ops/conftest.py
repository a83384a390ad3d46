"""How kernels run in the tests of a GPU."""

from collections.abc import Iterator

import pytest
import torch

from tests.ops.backends import ON_A_GPU


@pytest.fixture(autouse=True)
def nan_in_new_tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU, run with deterministic algorithms: torch then fills new tensors with nan.

    What a kernel fails to write is found.
    """
    if not ON_A_GPU or request.node.get_closest_marker("gpu") is None:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

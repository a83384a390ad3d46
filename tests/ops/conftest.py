"""How kernels run in the tests of a GPU."""

from collections.abc import Iterator

import pytest
import torch

from tests.ops.backends import ON_A_GPU


@pytest.fixture(autouse=True)
def first_configuration(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU, compile the first configuration of each Triton kernel only. The self checks run them all.

    With deterministic algorithms, nothing is measured, and torch fills new tensors with nan: what a kernel fails to
    write is found.
    """
    if not ON_A_GPU or request.node.get_closest_marker("gpu") is None:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

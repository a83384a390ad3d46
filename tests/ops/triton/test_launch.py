"""Which configuration of a kernel runs: one that lengths and times do not change, without any measurement."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu,dev]'")
import triton
from triton.runtime.errors import OutOfResources

from hstu.ops.functional import hstu_attention, project_uvqk
from hstu.ops.kernels import AttentionConfig, AttentionInputs
from hstu.ops.self_check import small_layout
from hstu.ops.triton import launch
from hstu.ops.triton.operators import OPERATORS

CONFIGS = [triton.Config({"SIZE": size}, num_warps=4, num_stages=1) for size in (1, 2, 3)]


class FakeKernel:
    """Notes the configurations in which it runs; the sizes ``too_large`` do not fit the device."""

    def __init__(self, ran: list[int], too_large: tuple[int, ...]) -> None:
        self._ran, self._too_large, self.fn = ran, too_large, type(self)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._run

    def _run(self, *, SIZE: int, **_: object) -> None:
        if SIZE in self._too_large:
            raise OutOfResources(2, 1, "shared memory")
        self._ran.append(SIZE)


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at a measurement: it stops the host, and takes 256 MB to flush the cache of the GPU."""
    for module, name in ((triton, "autotune"), (triton.testing, "do_bench")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a launch has measured"))


def test_each_launch_runs_the_first_configuration_that_fits() -> None:
    ran: list[int] = []
    assert not torch.are_deterministic_algorithms_enabled()
    for too_large in ((), (), (1,), (1, 2)):
        launch.launcher(FakeKernel(ran, too_large), lambda _: (1,), CONFIGS)()
    assert ran == [1, 1, 2, 3]
    with pytest.raises(OutOfResources):
        launch.launcher(FakeKernel(ran, (1, 2, 3)), lambda _: (1,), CONFIGS)()


def attention(lengths: list[int]) -> None:
    layout = small_layout(torch.device("cpu"), lengths, [0] * len(lengths))
    x = torch.zeros(layout.num_tokens, 1, 64, dtype=torch.bfloat16, requires_grad=True)
    inputs, shift = AttentionInputs(x, x, x, layout, AttentionConfig(0.1, 1)), torch.zeros(1, 3, 64, requires_grad=True)
    hstu_attention(inputs, OPERATORS["attention"], shift).sum().backward()


def projection(lengths: list[int]) -> None:
    x, weight, bias = (torch.zeros(*shape) for shape in ((sum(lengths), 64), (256, 64), (256,)))
    project_uvqk(x, weight, bias, OPERATORS["project_uvqk"])


@pytest.mark.parametrize("operator", [attention, projection])
def test_ranks_with_batches_of_any_lengths_run_the_same_configurations(operator: Callable[[list[int]], None]) -> None:
    chosen = []
    for lengths in ([3, 1], [700, 12]):
        with launch.recorded_launches((9, 0)) as launches:
            operator(lengths)
        chosen.append([(each.kernel.fn.__name__, str(each.configs[0])) for each in launches])
    assert chosen[0] == chosen[1] and any(len(each.configs) > 1 for each in launches)

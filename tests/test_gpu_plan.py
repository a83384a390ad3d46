"""The tests of a GPU fit one call of 10 minutes, as far as that is known without one."""

import pytest
import torch

from hstu.ops.kernels import KernelShapes
from tests import gpu_plan
from tests.conftest import GPU_TESTS, REPOSITORY


def test_all_tests_of_a_gpu_fit_their_limit(request: pytest.FixtureRequest) -> None:
    tests = request.config.stash[GPU_TESTS]
    assert gpu_plan.predicted_s(tests) <= gpu_plan.PLANNED_S, gpu_plan.describe(tests)


def test_a_test_that_nobody_planned_is_assumed_to_compile_kernels() -> None:
    added = [f"tests/ops/test_new.py::test_new[{number}]" for number in range(200)]
    assert gpu_plan.predicted_s(added) > gpu_plan.PLANNED_S
    assert gpu_plan.order_of(added[0]) == len(gpu_plan.COSTS)


@pytest.mark.parametrize("test", gpu_plan.COSTS)
def test_every_planned_test_exists(test: str) -> None:
    file, name = test.split("::")
    assert f"def {name}(" in (REPOSITORY / file).read_text(encoding="utf-8")


def kernels_of_self_check(shapes: KernelShapes) -> tuple[int, int]:
    """The kernels of attention and others that the self check compiles on an H100."""
    pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu]'")
    from hstu.ops.triton.compile_ahead import specialized_kernel
    from hstu.ops.triton.launch import Launch, recorded_launches
    from hstu.ops.triton.self_check import checks
    from tests.ops.triton.test_self_check import is_run

    kernels = set()
    for check in checks(torch.device("cpu"), shapes):
        launches: list[Launch] = []
        if is_run(check.case, shapes):
            with recorded_launches((9, 0)) as launches:
                check.measure()
        kernels |= {specialized_kernel(launch, launch.configs[0], 90) for launch in launches}
    of_attention = sum(kernel.startswith("attention") for kernel in kernels)
    return of_attention, len(kernels) - of_attention


def test_the_self_check_compiles_no_more_kernels_than_is_planned() -> None:
    from tests.ops.triton.test_self_check import SHAPES, WITH_BIAS

    cost = gpu_plan.COSTS["tests/ops/triton/test_self_check.py::test_all_kernels_pass"]
    attention, others = map(sum, zip(*map(kernels_of_self_check, (SHAPES, WITH_BIAS)), strict=True))
    assert 0 < attention <= 2 * cost.attention and 0 < others <= 2 * cost.kernels, (attention, others)

"""These fail when a library defect that hstu.parallel.row_sparse works around is fixed. Then simplify it."""

from __future__ import annotations

import pytest

from tests.distributed.launch import run_ranks

HERE = "tests.distributed.defect_cases"


def test_the_probe_itself_works() -> None:
    assert run_ranks(f"{HERE}:fused_sgd_on_the_cpu", 1) == ["rows (3, 4)"]


@pytest.mark.parametrize(
    ("probe", "symptom"),
    [
        ("fused_adam_on_the_cpu", "not supported in CPU mode"),
        ("dense_kernel_without_pooling_on_the_cpu", "Error: "),
        ("planning_the_dense_kernel", "PlannerError"),
    ],
)
def test_defect_is_still_there(probe: str, symptom: str) -> None:
    (result,) = run_ranks(f"{HERE}:{probe}", 1)
    assert symptom in result, f"{probe} now gives {result!r}: hstu/parallel/row_sparse.py may be simplified"

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.pipeline_cases import write_store
from tests.distributed.reduction_cases import LATE_S

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    store: Path = tmp_path_factory.mktemp("reduction") / "store"
    write_store(store)
    return run_ranks("tests.distributed.reduction_cases:run", 2, timeout_s=120, store=str(store))


def test_gradients_are_reduced_while_backward_goes_on(told: Any) -> None:
    for rank in told:
        order = rank["order"]
        assert order.count("bucket") > 1
        still_to_come = order[order.index("bucket") :].count("gradient")
        assert still_to_come > order.count("gradient") / 4


@pytest.mark.parametrize("where", ["before the step", "in backward"])
def test_the_benchmarks_clock_tells_waiting_for_a_late_rank(told: Any, where: str) -> None:
    in_time, late = (rank["waits"][where] for rank in told)
    assert LATE_S * 0.8 < in_time[1] < LATE_S * 2
    assert in_time[0] < LATE_S / 2 and sum(late) < LATE_S / 2
    assert sum(told[0]["waits"]["nowhere"]) < LATE_S / 2

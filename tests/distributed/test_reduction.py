from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.pipeline_cases import write_store
from tests.distributed.reduction_cases import GRADIENTS, LATE_S


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_sent_in_the_type_asked_for(told: Any, dtype: torch.dtype) -> None:
    exact = torch.tensor(GRADIENTS)
    expected = (exact.to(dtype) / 2).sum(0).float()
    for number, rank in enumerate(told):
        sent = rank["sent"][str(dtype)]
        assert sent["averaged"] == [True, expected.tolist()]
        assert sent["finite"] == [True, number == 0 or dtype != torch.float16]
    assert bool((expected == exact.mean(0)).all()) == (dtype == torch.float32)


def test_a_run_sends_its_gradients_as_it_is_told(told: Any) -> None:
    for rank in told:
        (exact, exact_losses), (rounded, losses) = rank["asked"]["True"], rank["asked"]["False"]
        assert (exact, rounded) == ("torch.float32", "torch.bfloat16")
        assert losses == pytest.approx(exact_losses, rel=1e-3) and losses != exact_losses


@pytest.mark.parametrize("where", ["before the step", "in backward"])
def test_the_benchmarks_clock_tells_waiting_for_a_late_rank(told: Any, where: str) -> None:
    in_time, late = (rank["waits"][where] for rank in told)
    assert LATE_S * 0.6 < in_time[1] < LATE_S * 2
    assert in_time[0] < LATE_S / 2 and sum(late) < LATE_S / 2
    assert sum(told[0]["waits"]["nowhere"]) < LATE_S / 2

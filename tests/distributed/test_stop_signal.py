"""A stop signal of one rank reaches all ranks in the collective of the check that every step makes anyway."""

import signal
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hstu.parallel.mesh import Mesh
from hstu.pipeline.finite import FiniteCheck, Stopped, StopSignal
from tests.distributed.launch import Launch, run_cases


def check_two_steps(mesh: Mesh, deferred: bool) -> dict[str, Any]:
    """The last rank receives SIGTERM before the first of two checked steps."""
    check = FiniteCheck(mesh)
    check.deferred = deferred
    stop = StopSignal(mesh, check)
    all_reduce, collectives, raised = dist.all_reduce, [], []

    def counted(*args: Any, **options: Any) -> Any:
        collectives.append(1)
        return all_reduce(*args, **options)

    dist.all_reduce = counted
    try:
        if mesh.rank == mesh.world_size - 1:
            stop._receive(signal.SIGTERM, None)
        for _ in range(2):
            check(torch.tensor(1.0), torch.tensor(True), None)  # type: ignore[arg-type]  # a batch is for errors
            try:
                stop.raise_if_agreed()
                raised.append("")
            except Stopped as stopped:
                raised.append(str(stopped))
    finally:
        dist.all_reduce = all_reduce
    return {"raised": raised, "collectives": len(collectives)}


@pytest.mark.parametrize(("ranks", "tp", "collectives"), [(2, 1, 1), (2, 2, 1), (4, 2, 2)])
def test_all_ranks_stop_after_the_same_step_without_a_collective_of_their_own(
    ranks: int, tp: int, collectives: int
) -> None:
    cases = {
        "at once": partial(check_two_steps, deferred=False),
        "one step later": partial(check_two_steps, deferred=True),
    }
    for rank in run_cases(Launch(ranks, 60, tp=tp), cases):
        assert rank["at once"] == {"raised": ["SIGTERM", "SIGTERM"], "collectives": 2 * collectives}
        assert rank["one step later"] == {"raised": ["", "SIGTERM"], "collectives": 2 * collectives}

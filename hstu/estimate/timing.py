"""An operator of a training step: its cost, and the code by which it is timed on a CPU.

A GPU step is estimated from the costs by roofline, a CPU step by running the operators themselves at the shapes of the
run (machine.py does both). Operators that would run for long are timed on fewer rows, and the time is scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hstu.ops.costs import Cost
from hstu.parallel.mesh import Mesh

MOST_FLOPS = 4e9
_MOST_BYTES = 2e8
"""Limits of what is timed: operations and bytes of an operator."""

Forward = tuple[Callable[[], Tensor | tuple[Tensor, ...]], list[Tensor]]
"""The forward of an operator, and the tensors whose gradients its backward computes."""


class Timed(NamedTuple):
    """Code that takes as long as an operator, or a part of it."""

    run: Callable[[], object]
    scale: float
    """The operator takes this many times as long as ``run``."""
    first: Callable[[], object] | None = None
    """What the first of a step's equal operators runs, if it has more to do than the others."""


@dataclass(frozen=True)
class Operator:
    """``times`` equal operators of a step, each with forward and backward."""

    name: str
    cost: Cost
    prepare: Callable[[Mesh], Timed]
    """Allocates the inputs, on the CPU. The mesh is that of a single rank."""
    times: int = 1
    extra_forwards: int = 0
    """Forwards that backward runs again, for each operator."""


def rows_to_time(cost: Cost, rows: int) -> int:
    """How many of an operator's rows are timed."""
    share = MOST_FLOPS / cost.flops if cost.flops else _MOST_BYTES / max(cost.bytes, 1.0)
    return max(1, min(rows, max(256, int(rows * share))))


def timed_operator(name: str, cost: Cost, rows: int, build: Callable[[int], Forward]) -> Operator:
    """Timed by the forward and backward of ``build(n)`` for as many of its rows as the limits allow."""

    def prepare(_: Mesh) -> Timed:
        fewer = rows_to_time(cost, rows)
        forward, leaves = build(fewer)
        out = forward()
        grads = [torch.randn_like(each) for each in ((out,) if isinstance(out, Tensor) else out)]
        return Timed(lambda: torch.autograd.grad(forward(), leaves, grads), rows / fewer)

    return Operator(name, cost, prepare)

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hstu.parallel.row_lazy_adam import RowLazyAdam

LR, BETAS, EPS = 0.01, (0.9, 0.99), 1e-6


def sparse(rows: list[int], values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.int64), values, size, check_invariants=True)


def fbgemm_adam(weight: list[float], gradients: dict[int, list[list[float]]], steps: int) -> list[float]:
    """FBGEMM's formula for one row in plain Python: ``gradients[t]`` lists the row's gradients at step t."""
    width = len(weight)
    first, second, result = [0.0] * width, [0.0] * width, list(weight)
    for t in range(1, steps + 1):
        for column in range(width) if t in gradients else ():
            g = sum(gradient[column] for gradient in gradients[t])
            first[column] = BETAS[0] * first[column] + (1 - BETAS[0]) * g
            second[column] = BETAS[1] * second[column] + (1 - BETAS[1]) * g * g
            m_hat = first[column] / (1 - BETAS[0] ** t)
            v_hat = second[column] / (1 - BETAS[1] ** t)
            result[column] -= LR * m_hat / (math.sqrt(v_hat) + EPS)
    return result


def test_it_follows_fbgemms_formula_also_for_repeated_and_skipped_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn((4, 3), generator=generator, dtype=torch.float64))
    expected = weight.tolist()
    rows_of_step = {1: [0, 2, 0], 2: [2], 3: [0, 3], 4: [2, 2]}
    gradients: dict[int, dict[int, list[list[float]]]] = {row: {} for row in range(4)}
    optimizer = RowLazyAdam([weight], LR, BETAS, EPS)
    for step, rows in rows_of_step.items():
        values = torch.randn((len(rows), 3), generator=generator, dtype=torch.float64)
        for row, value in zip(rows, values.tolist(), strict=True):
            gradients[row].setdefault(step, []).append(value)
        weight.grad = sparse(rows, values, (4, 3))
        optimizer.step()
    expected = [fbgemm_adam(expected[row], gradients[row], steps=4) for row in range(4)]
    torch.testing.assert_close(weight.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_rows_that_are_not_looked_up_keep_weights_and_moments() -> None:
    weight = nn.Parameter(torch.ones(5, 2))
    optimizer = RowLazyAdam([weight], LR, BETAS, EPS)
    weight.grad = sparse([1, 4], torch.ones(2, 2), (5, 2))
    optimizer.step()
    before = [tensor[1].clone() for tensor in (weight, *optimizer.state[weight].values())]
    weight.grad = sparse([0], torch.ones(1, 2), (5, 2))
    optimizer.step()
    after = [tensor[1] for tensor in (weight, *optimizer.state[weight].values())]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    assert torch.equal(weight[2], torch.ones(2))


def test_a_step_without_looked_up_rows_only_counts() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = RowLazyAdam([weight], LR, BETAS, EPS)
    weight.grad = sparse([], torch.ones(0, 2), (3, 2))
    optimizer.step()
    weight.grad = None
    optimizer.step()
    assert torch.equal(weight, torch.ones(3, 2))
    assert optimizer.steps == 2


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor with a storage of its own that any operation makes."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            own = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
            if own and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("rows", [1_000, 1_000_000])
def test_the_cost_of_lookup_and_step_depends_on_the_rows_touched_not_on_the_table(rows: int) -> None:
    weight = nn.Parameter(torch.zeros(rows, 8))
    optimizer = RowLazyAdam([weight], LR, BETAS, EPS)
    ids = torch.arange(0, rows, rows // 100)
    with Allocations([weight, *optimizer.state[weight].values()]) as allocations:
        nn.functional.embedding(ids, weight, sparse=True).sum().backward()
        optimizer.step()
    assert allocations.largest == 100 * 8
    assert (weight.detach()[ids] != 0).all()

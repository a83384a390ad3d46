"""Optimizers of tables: every backend against a float64 loop over rows."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu.ops import row_update as plain
from hstu.ops.cpu import operators as cpp
from hstu.ops.row_update import RowUpdate

STATES = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 1, "adam": 2, "partial_rowwise_adam": 2}
KERNELS = {"C++": cpp.update_rows, "PyTorch": plain.update_rows}


def sparse(rows: Tensor, values: Tensor, size: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(rows[None], values, size, check_invariants=True)


def oracle(rows: Tensor, values: Tensor, tables: list[Tensor], update: RowUpdate) -> list[Tensor]:
    """Weight and states [rows, D], one number at a time; a state of [rows] has its number in each column."""
    width = tables[0].shape[1]
    new = [(table if table.dim() > 1 else table[:, None].expand(-1, width)).double().tolist() for table in tables]
    for row in rows.unique().tolist():
        gradient = values[rows == row].double().sum(0)
        if update.max_gradient is not None:
            gradient = gradient.clamp(-update.max_gradient, update.max_gradient)
        mean = gradient.square().mean().item()
        for column, g in enumerate(gradient.tolist()):
            numbers = [table[row][column] for table in new]
            for table, number in zip(new, _number(g, mean, numbers, update), strict=True):
                table[row][column] = number
    columns = [slice(None) if table.dim() > 1 else 0 for table in tables]
    return [torch.tensor(table, dtype=torch.float64)[:, own] for table, own in zip(new, columns, strict=True)]


def _number(g: float, mean_square: float, old: list[float], update: RowUpdate) -> list[float]:
    rate, eps, (beta1, beta2), step = update.learning_rate, update.eps, update.betas, update.step
    match update.optimizer:
        case "sgd":
            return [old[0] - rate * g]
        case "adagrad" | "rowwise_adagrad":
            total = old[1] + (g * g if update.optimizer == "adagrad" else mean_square)
            return [old[0] - rate * g / (math.sqrt(total) + eps), total]
        case "adam" | "partial_rowwise_adam":
            square = g * g if update.optimizer == "adam" else mean_square
            m, v = beta1 * old[1] + (1 - beta1) * g, beta2 * old[2] + (1 - beta2) * square
            deviation = math.sqrt(v / (1 - beta2**step)) + eps
            return [old[0] - rate * m / (1 - beta1**step) / deviation, m, v]


def case(optimizer: str, count: int, table_rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows, gradients and tables."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(table_rows, (count,), generator=generator)
    values = torch.randn(count, width, generator=generator)
    tables = [torch.rand(table_rows, width, generator=generator) for _ in range(1 + STATES[optimizer])]
    if optimizer.startswith(("partial", "rowwise")):
        tables[-1] = tables[-1][:, 0].clone()
    return rows, values, tables


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, max_examples=40)
@given(
    optimizer=st.sampled_from([*STATES]),
    count=st.sampled_from([0, 1, 7, 300]),
    table_rows=st.sampled_from([1, 5, 3000]),
    width=st.sampled_from([1, 16, 50]),
    max_gradient=st.sampled_from([None, 0.5]),
    seed=st.integers(0, 1000),
)
def test_rows_with_a_gradient_are_trained_by_the_formula(
    kernel: str,
    optimizer: Any,
    count: int,
    table_rows: int,
    width: int,
    max_gradient: float | None,
    seed: int,
) -> None:
    rows, values, tables = case(optimizer, count, table_rows, width, seed)
    update = RowUpdate(optimizer, 0.1, 1e-6, (0.9, 0.98), step=3, max_gradient=max_gradient)
    expected = oracle(rows, values, tables, update)
    KERNELS[kernel](sparse(rows, values, tables[0].shape), tables[0], tables[1:], update)
    for table, right in zip(tables, expected, strict=True):
        torch.testing.assert_close(table.double(), right, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kernel", [*KERNELS.values()], ids=[*KERNELS])
@pytest.mark.parametrize("optimizer", STATES)
def test_rows_without_a_gradient_keep_every_bit(kernel: Any, optimizer: Any) -> None:
    _, values, tables = case(optimizer, 3, 9, 4)
    before = [table.clone() for table in tables]
    update = RowUpdate(optimizer, 0.1, 1e-6, (0.9, 0.98))
    kernel(sparse(torch.tensor([7, 2, 7]), values, (9, 4)), tables[0], tables[1:], update)
    for old, new in zip(before, tables, strict=True):
        moved = (old != new).view(9, -1).any(1).nonzero().flatten().tolist()
        assert moved == [2, 7]


@pytest.mark.parametrize("kernel", [*KERNELS.values()], ids=[*KERNELS])
def test_rows_far_apart_are_put_in_order(kernel: Any) -> None:
    rows = torch.tensor([9_000_000, 3, 2_500_000, 9_000_000, 4_194_304, 3])
    table, values = torch.zeros(9_000_001, 1), torch.arange(1.0, 7.0)[:, None]
    kernel(sparse(rows, values, (9_000_001, 1)), table, (), RowUpdate("sgd", 1.0))
    expected = {3: -8.0, 2_500_000: -3.0, 4_194_304: -5.0, 9_000_000: -5.0}
    assert {row: table[row].item() for row in table.nonzero()[:, 0].tolist()} == expected


@pytest.mark.parametrize("optimizer", STATES)
def test_a_dense_gradient_trains_the_same_rows_and_nothing_changes_in_a_step_that_is_not_finite(optimizer: Any) -> None:
    rows, values, tables = case(optimizer, 40, 60, 5)
    others, before = ([table.clone() for table in tables] for _ in range(2))
    gradient = sparse(rows, values, (60, 5))
    update = RowUpdate(optimizer, 0.1, 1e-6, (0.9, 0.98), step=2, max_gradient=1.0)
    for each in (gradient, gradient.to_dense()):
        cpp.update_rows(each, tables[0], tables[1:], update, torch.tensor(1.0))
        assert all(map(torch.equal, before, tables))
    plain.update_rows(gradient, tables[0], tables[1:], update)
    plain.update_rows(gradient.to_dense(), others[0], others[1:], update)
    for left, right in zip(tables, others, strict=True):
        torch.testing.assert_close(left, right)


def test_the_bits_depend_neither_on_threads_nor_on_the_place_of_a_row() -> None:
    rows, values, tables = case("adam", 5000, 700, 50)
    update, threads, found = RowUpdate("adam", 0.1, 1e-8, (0.9, 0.98)), torch.get_num_threads(), []
    try:
        for count, shift in ((1, 0), (3, 0), (2, 11)):
            torch.set_num_threads(count)
            moved = [torch.cat([torch.rand(shift, 50), table]) for table in tables]
            cpp.update_rows(sparse(rows + shift, values, (700 + shift, 50)), moved[0], moved[1:], update)
            found.append([table[shift:] for table in moved])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(left, right) for left, right in zip(found[0], other, strict=True))

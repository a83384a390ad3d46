"""Operators on whole rows by Triton kernels: jagged concatenation, positions, sums by key."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.layout import TokenOrder
from hstu.ops.triton.launch import launcher
from hstu.ops.triton.primitives import elements, matrix

ROWS = 8
"""Rows of a tile."""
COLUMNS = 512
"""Largest number of columns of a tile."""


def jagged_concat(parts: Sequence[Tensor], order: TokenOrder) -> Tensor:
    """See :attr:`hstu.ops.kernels.Kernels.jagged_concat`. Parts may have any strides; each row is copied once."""
    return _Concat.apply(order.inverse, *parts)


class _Concat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inverse: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.lengths, ctx.dtypes = [len(part) for part in parts], [part.dtype for part in parts]
        dtype = reduce(torch.promote_types, ctx.dtypes)
        tokens = torch.empty(sum(ctx.lengths), parts[0].shape[1], dtype=dtype, device=parts[0].device)
        for part, index in zip(parts, inverse.split(ctx.lengths), strict=True):
            _move_rows(part, tokens, index, scatter=True)
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = []
        for index, dtype in zip(ctx.saved_tensors[0].split(ctx.lengths), ctx.dtypes, strict=True):
            part = torch.empty(len(index), grad.shape[1], dtype=grad.dtype, device=grad.device)
            _move_rows(grad, part, index, scatter=False)
            grads.append(part.to(dtype))
        return None, *grads


def add_positions(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """See :attr:`hstu.ops.kernels.Kernels.add_positions`. The gradient of the table has the same bits in every run."""
    return _AddPositions.apply(x, table, positions)


class _AddPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.table, ctx.dtype = (len(table), table.dtype), x.dtype
        out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, table.dtype), device=x.device)
        if x.numel():
            launch = _over_tiles(add_table_rows, *x.shape)
            launch(x=matrix(x), table=matrix(table), positions=positions, out=matrix(out), last=len(table) - 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        num_positions, table_dtype = ctx.table
        grad_table = None
        if ctx.needs_input_grad[1]:
            keys = positions.clamp(max=num_positions - 1)
            grad_table = sums_by_key(grad, keys, num_positions).to(table_dtype)
        return grad.to(ctx.dtype), grad_table, None


def sums_by_key(
    values: Tensor, keys: Tensor, num_keys: int, weights: Tensor | None = None, entries_per_row: int = 1
) -> Tensor:
    """float32 [num_keys, D]: for each key the sum of weights[e] · values[e // entries_per_row] over its entries e.

    values: [M, D]. keys: int64 [M · entries_per_row] in [0, num_keys). weights: float32, one per entry of ``keys``.
    Sorting makes the entries of each key contiguous, so no atomics are needed.
    """
    totals = torch.empty(num_keys, values.shape[1], dtype=torch.float32, device=values.device)
    if not totals.numel():
        return totals
    ordered, order = keys.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_keys + 1, dtype=ordered.dtype, device=ordered.device))
    launcher(sum_runs, lambda meta: (num_keys, triton.cdiv(values.shape[1], meta["BLOCK"])), _config(values.shape[1]))(
        values=matrix(values),
        sources=order,
        weights=weights,
        starts=starts,
        totals=totals,
        entries_per_source=entries_per_row,
        WIDTH=values.shape[1],
        WEIGHTED=weights is not None,
    )
    return totals


def _move_rows(source: Tensor, target: Tensor, index: Tensor, scatter: bool) -> None:
    """target[index] = source if ``scatter``, else target = source[index]; the rows in ``index`` are distinct."""
    if len(index) and source.shape[1]:
        launch = _over_tiles(permute_rows, len(index), source.shape[1])
        launch(source=matrix(source), target=matrix(target), index=index, SCATTER=scatter)


def _over_tiles(kernel: Any, num_rows: int, width: int) -> Callable[..., object]:
    grid = lambda meta: (triton.cdiv(num_rows, meta["ROWS"]), triton.cdiv(width, meta["BLOCK"]))  # noqa: E731
    return partial(launcher(kernel, grid, _config(width)), num_rows=num_rows, WIDTH=width)


def _config(width: int) -> list[triton.Config]:
    block = min(COLUMNS, max(16, triton.next_power_of_2(width)))
    return [triton.Config({"BLOCK": block, "ROWS": ROWS}, num_warps=4, num_stages=2)]


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["index"])
def permute_rows(
    source, target, index, num_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SCATTER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """target[index[r]] = source[r] if SCATTER, else target[r] = source[index[r]]. Grid: (row blocks, column blocks)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_row = rows < num_rows
    here, elsewhere = rows.to(tl.int64), tl.load(index + rows, mask=is_row, other=0).to(tl.int64)
    inside = is_row[:, None] & (columns < WIDTH)[None, :]
    read, written = (here, elsewhere) if SCATTER else (elsewhere, here)
    values = tl.load(elements(source, read[:, None], columns[None, :]), mask=inside)
    tl.store(elements(target, written[:, None], columns[None, :]), values, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def add_table_rows(
    x, table, positions, out, num_rows, last, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """out = x + table[min(positions, last)]. Grid: (row blocks, column blocks)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_row = rows < num_rows
    position = tl.minimum(tl.load(positions + rows, mask=is_row, other=0), last)[:, None]
    rows, columns = rows[:, None], columns[None, :]
    inside = is_row[:, None] & (columns < WIDTH)
    values = tl.load(elements(x, rows, columns), mask=inside).to(tl.float32)
    values += tl.load(elements(table, position, columns), mask=inside).to(tl.float32)
    tl.store(elements(out, rows, columns), values.to(out.data.dtype.element_ty), mask=inside)


@triton.jit
def sum_runs(
    values, sources, weights, starts, totals, entries_per_source,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """totals[r] = Σ weights[e] · values[e // entries_per_source] over entries e of run r. Grid: (runs, column blocks).

    The entries of run r are ``sources[starts[r]:starts[r + 1]]``. A stable sort fixes their order, so the bits repeat.
    """
    run = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(starts + run)
    stop = tl.load(starts + run + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(start, stop, ROWS):
        index = first + tl.arange(0, ROWS)
        is_entry = index < stop
        entries = tl.load(sources + index, mask=is_entry, other=0)
        rows = entries // entries_per_source
        inside = is_entry[:, None] & (columns < WIDTH)[None, :]
        block = tl.load(elements(values, rows[:, None], columns[None, :]), mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            block *= tl.load(weights + entries, mask=is_entry, other=0.0)[:, None]
        total += tl.sum(block, axis=0)
    tl.store(totals + run.to(tl.int64) * WIDTH + columns, total, mask=columns < WIDTH)

"""Writes the first values of table rows whose slots have new ids, as many as the device says."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hstu.ops.triton.launch import launcher
from hstu.ops.triton.slot_kernels import mixed

_CONFIG = [triton.Config({"ROWS": 16, "COLUMNS": 64}, num_warps=4, num_stages=1)]
_MOST_PROGRAMS = 2048


def start_rows(
    target: Tensor,
    rows: Tensor,
    number: Tensor,
    ids: Tensor | None = None,
    quantiles: Tensor | None = None,
    *,
    first_row: int = 0,
    columns: int | None = None,
    table_key: int = 0,
    init_std: float = 0.0,
) -> None:
    """Set target[rows[i] - first_row] for i below ``number`` to its initial row, or to zeros without ``ids``.

    ``target``: float32 [R, columns or more], or [R]; ``rows``: int64 or int32 [n], those outside of ``target`` are
    skipped; ``number``: int64 [1]. ``quantiles``, ``table_key`` and ``init_std`` are those of ``initial_rows`` in
    hstu/parallel/dynamic/hashing.py, which defines the values.
    """
    matrix = target.unsqueeze(1) if target.dim() == 1 else target
    columns = matrix.shape[1] if columns is None else columns
    grid = lambda meta: (min(_MOST_PROGRAMS, triton.cdiv(len(rows), meta["ROWS"])),)  # noqa: E731
    if len(rows):
        launcher(write_first_values, grid, _CONFIG)(
            target=matrix,
            rows=rows,
            ids=ids,
            quantiles=quantiles,
            number=number,
            first_row=first_row,
            num_rows=len(matrix),
            columns=columns,
            stride=matrix.stride(0),
            table_key=table_key,
            init_std=init_std,
        )


@triton.jit(do_not_specialize=["first_row", "num_rows", "columns", "table_key", "init_std"])
def write_first_values(
    target, rows, ids, quantiles, number, first_row, num_rows, columns, stride, table_key, init_std,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """See ``start_rows``. Four columns share a hash, whose 16-bit parts select their quantiles. Grid: any."""
    bound = tl.load(number)
    stop = (bound + ROWS - 1) // ROWS
    for block in range(tl.program_id(0), stop, tl.num_programs(0)):
        place = block * ROWS + tl.arange(0, ROWS)
        row = tl.load(rows + place, mask=place < bound, other=-1).to(tl.int64) - first_row
        here = (place < bound) & (row >= 0) & (row < num_rows)
        if ids is not None:
            key = mixed(tl.load(ids + place, mask=here, other=0) ^ table_key).to(tl.int64, bitcast=True)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = here[:, None] & (column < columns)[None, :]
            if ids is None:
                value = tl.zeros((ROWS, COLUMNS), tl.float32)
            else:
                bits = mixed(key[:, None] + (column // 4)[None, :])
                part = (bits >> (16 * (column % 4)).to(tl.uint64)[None, :]) & 0xFFFF
                value = tl.load(quantiles + (part ^ 0x8000).to(tl.int64), mask=mask, other=0.0) * init_std
            tl.store(target + row[:, None] * stride + column[None, :], value, mask=mask)

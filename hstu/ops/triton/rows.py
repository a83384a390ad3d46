"""Launching the kernels of row_kernels.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from hstu.ops.triton.launch import launch
from hstu.ops.triton.row_kernels import permute_rows, sum_runs

ROWS = 8
"""Rows of a tile."""
COLUMNS = 512
"""Columns of a tile, at most."""


def tile_of(width: int) -> dict[str, int]:
    """BLOCK and ROWS of tiles over rows of ``width`` columns."""
    return {"BLOCK": min(COLUMNS, max(16, triton.next_power_of_2(width))), "ROWS": ROWS}


def row_grid(num_rows: int, width: int) -> Any:
    """Row blocks × column blocks."""
    return lambda meta: (triton.cdiv(num_rows, meta["ROWS"]), triton.cdiv(width, meta["BLOCK"]))


def row_config(width: int) -> list[triton.Config]:
    """The configuration of kernels over tiles of rows."""
    return [triton.Config(tile_of(width), num_warps=4, num_stages=2)]


def move_rows(source: Tensor, target: Tensor, index: Tensor, scatter: bool) -> None:
    """target[index] = source if ``scatter``, else target = source[index]; rows of one index each, no repetition."""
    num_rows, width = len(index), source.shape[1]
    if not num_rows or not width:
        return
    launch(
        permute_rows,
        row_grid(num_rows, width),
        row_config(width),
        (),
        source=source,
        target=target,
        index=index,
        num_rows=num_rows,
        stride_sr=source.stride(0),
        stride_sc=source.stride(1),
        stride_tr=target.stride(0),
        stride_tc=target.stride(1),
        WIDTH=width,
        SCATTER=scatter,
    )


def sums_by_key(
    values: Tensor, keys: Tensor, num_keys: int, weights: Tensor | None = None, entries_per_row: int = 1
) -> Tensor:
    """float32 [num_keys, D]: for each key the sum of weights[e] · values[e // entries_per_row] over its entries e.

    values: [M, D]; keys: int64 [M · entries_per_row] in [0, num_keys); weights: float32, as many. Sorting makes each
    key's entries a run, so that nothing is added atomically.
    """
    totals = torch.empty(num_keys, values.shape[1], dtype=torch.float32, device=values.device)
    if not totals.numel():
        return totals
    ordered, order = keys.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_keys + 1, dtype=ordered.dtype, device=ordered.device))
    config = row_config(values.shape[1])
    launch(
        sum_runs,
        lambda meta: (num_keys, triton.cdiv(values.shape[1], meta["BLOCK"])),
        config,
        (),
        values=values,
        sources=order,
        weights=weights,
        starts=starts,
        totals=totals,
        entries_per_source=entries_per_row,
        stride_vr=values.stride(0),
        stride_vc=values.stride(1),
        WIDTH=values.shape[1],
        WEIGHTED=weights is not None,
    )
    return totals

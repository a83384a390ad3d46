"""Kernels that move or sum whole rows: jagged concatenation, position encoding, sums of sorted runs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def permute_rows(
    source, target, index, num_rows, stride_sr, stride_sc, stride_tr, stride_tc,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SCATTER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """target[index[r]] = source[r] if SCATTER, else target[r] = source[index[r]]. Grid: (row blocks, column blocks)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_row = rows < num_rows
    elsewhere = tl.load(index + rows, mask=is_row, other=0)[:, None].to(tl.int64)
    here = rows[:, None].to(tl.int64)
    inside = is_row[:, None] & (columns < WIDTH)[None, :]
    read, written = (here, elsewhere) if SCATTER else (elsewhere, here)
    values = tl.load(source + read * stride_sr + columns[None, :] * stride_sc, mask=inside)
    tl.store(target + written * stride_tr + columns[None, :] * stride_tc, values, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def add_table_rows(
    x, table, positions, out, num_rows, last, stride_xr, stride_xc, stride_tr, stride_tc, stride_or,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out = x + table[min(positions, last)]. Grid: (row blocks, column blocks)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_row = rows < num_rows
    place = tl.minimum(tl.load(positions + rows, mask=is_row, other=0), last)[:, None]
    rows = rows[:, None].to(tl.int64)
    inside = is_row[:, None] & (columns < WIDTH)[None, :]
    values = tl.load(x + rows * stride_xr + columns[None, :] * stride_xc, mask=inside).to(tl.float32)
    values += tl.load(table + place * stride_tr + columns[None, :] * stride_tc, mask=inside).to(tl.float32)
    tl.store(out + rows * stride_or + columns[None, :], values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_runs(
    values, sources, weights, starts, totals, entries_per_source, stride_vr, stride_vc,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """totals[r] = Σ over entries e of run r of weights[e] · values[e // entries_per_source], e = sources[place].

    Runs are [starts[r], starts[r + 1]) of ``sources``, as a stable sort leaves them: a fixed order, hence the same bits
    in every run. Grid: (runs, column blocks).
    """
    run = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(starts + run)
    stop = tl.load(starts + run + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(start, stop, ROWS):
        places = first + tl.arange(0, ROWS)
        is_entry = places < stop
        entries = tl.load(sources + places, mask=is_entry, other=0)
        rows = entries // entries_per_source
        inside = is_entry[:, None] & (columns < WIDTH)[None, :]
        block = tl.load(values + rows[:, None] * stride_vr + columns[None, :] * stride_vc, mask=inside, other=0.0)
        block = block.to(tl.float32)
        if WEIGHTED:
            block *= tl.load(weights + entries, mask=is_entry, other=0.0)[:, None]
        total += tl.sum(block, axis=0)
    tl.store(totals + run.to(tl.int64) * WIDTH + columns, total, mask=columns < WIDTH)

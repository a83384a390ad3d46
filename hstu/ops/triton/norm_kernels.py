"""Kernels over rows: layer norm, and the gated, dropped-out norm behind the attention.

A row is one program's step and is read once; x and u are [T, H, d] of any strides, BLOCK ≥ H · d columns. Gradients of
the affine weights are summed per program in registers and the programs' sums by the caller: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _keeps(seed, row, dropout, BLOCK: tl.constexpr):
    """bool [BLOCK]: the elements that stay. A function of seed, row and column, so that backward asks again.

    One run of Philox makes four numbers; a run a number would take longer than the memory traffic.
    """
    quads = tl.arange(0, BLOCK // 4)
    zero = tl.zeros((BLOCK // 4,), tl.int32)
    a, b, c, d = tl.philox(seed, quads, (zero + row).to(tl.int32), zero, zero)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK,))
    return tl.uint_to_uniform_float(words) >= dropout


@triton.jit
def _load_row(base, row, columns, stride_t, stride_h, stride_d, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    pointers = base + row * stride_t + (columns // HEAD) * stride_h + (columns % HEAD) * stride_d
    return tl.load(pointers, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _store_row(base, row, columns, stride_t, stride_h, stride_d, values, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    pointers = base + row * stride_t + (columns // HEAD) * stride_h + (columns % HEAD) * stride_d
    tl.store(pointers, values.to(base.dtype.element_ty), mask=columns < WIDTH)


@triton.jit(do_not_specialize=["num_rows"])
def row_statistics(
    x, mean, variance, num_rows, stride_xt, stride_xh, stride_xd, WIDTH: tl.constexpr, HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and mean square about it of each row. Grid: (programs,)."""
    columns = tl.arange(0, BLOCK)
    for row in tl.range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        values = _load_row(x, row, columns, stride_xt, stride_xh, stride_xd, WIDTH, HEAD)
        center = tl.sum(values, axis=0) / WIDTH
        centered = tl.where(columns < WIDTH, values - center, 0.0)
        tl.store(mean + row, center)
        tl.store(variance + row, tl.sum(centered * centered, axis=0) / WIDTH)


@triton.jit(do_not_specialize=["num_rows", "seed"])
def norm_mul_dropout_forward(
    x, u, weight, bias, out, mean, inverse_std, num_rows, eps, dropout, seed,
    stride_xt, stride_xh, stride_xd, stride_ut, stride_uh, stride_ud, stride_ot,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, DROPPED: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """out = dropout((norm(x) · weight + bias) ⊙ u). GIVEN: mean and inverse_std are read.

    Else they are written. Grid: (programs,).
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        values = _load_row(x, row, columns, stride_xt, stride_xh, stride_xd, WIDTH, HEAD)
        if GIVEN:
            center = tl.load(mean + row)
            inverse = tl.load(inverse_std + row)
        else:
            center = tl.sum(values, axis=0) / WIDTH
            centered = tl.where(inside, values - center, 0.0)
            inverse = tl.rsqrt(tl.sum(centered * centered, axis=0) / WIDTH + eps)
            tl.store(mean + row, center)
            tl.store(inverse_std + row, inverse)
        result = (values - center) * inverse * scale + shift
        if GATED:
            result *= _load_row(u, row, columns, stride_ut, stride_uh, stride_ud, WIDTH, HEAD)
        if DROPPED:
            result = tl.where(_keeps(seed, row, dropout, BLOCK), result / (1.0 - dropout), 0.0)
        tl.store(out + row * stride_ot + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "seed"])
def norm_mul_dropout_backward(
    x, u, weight, bias, mean, inverse_std, grad, grad_x, grad_u, gated, weight_sums, bias_sums, row_sums,
    num_rows, dropout, seed,
    stride_xt, stride_xh, stride_xd, stride_ut, stride_uh, stride_ud, stride_gt, stride_gd,
    stride_gxt, stride_gxh, stride_gxd, stride_gut, stride_guh, stride_gud, stride_st,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, DROPPED: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """Gradients and, GATED, what forward returned. Grid: (programs,); each writes its row of weight_sums and bias_sums.

    PASS "all": at once. Where a row's heads lie on several ranks: "sums" writes row_sums [2, T], the means over the own
    columns that grad_x needs, and all but grad_x; "rows" reads the means over all ranks there and writes grad_x.
    weight_sums, bias_sums: [programs, WIDTH].
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        values = _load_row(x, row, columns, stride_xt, stride_xh, stride_xd, WIDTH, HEAD)
        upstream = tl.load(grad + row * stride_gt + columns * stride_gd, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_std + row)
        normalised = tl.where(inside, (values - tl.load(mean + row)) * inverse, 0.0)
        if DROPPED:
            factor = tl.where(_keeps(seed, row, dropout, BLOCK), 1.0 / (1.0 - dropout), 0.0)
            upstream *= factor
        if GATED:
            gate = _load_row(u, row, columns, stride_ut, stride_uh, stride_ud, WIDTH, HEAD)
            if PASS != "rows":
                affine = normalised * scale + shift
                _store_row(grad_u, row, columns, stride_gut, stride_guh, stride_gud, upstream * affine, WIDTH, HEAD)
                again = affine * gate
                if DROPPED:
                    again *= factor
                tl.store(gated + row * WIDTH + columns, again.to(gated.dtype.element_ty), mask=inside)
            upstream *= gate
        weight_sum += upstream * normalised
        bias_sum += upstream
        scaled = upstream * scale
        if PASS == "rows":
            along_one = tl.load(row_sums + row)
            along_row = tl.load(row_sums + stride_st + row)
        else:
            along_one = tl.sum(scaled, axis=0) / WIDTH
            along_row = tl.sum(scaled * normalised, axis=0) / WIDTH
        if PASS == "sums":
            tl.store(row_sums + row, along_one)
            tl.store(row_sums + stride_st + row, along_row)
        else:
            of_x = (scaled - along_one - normalised * along_row) * inverse
            _store_row(grad_x, row, columns, stride_gxt, stride_gxh, stride_gxd, of_x, WIDTH, HEAD)
    if PASS != "rows":
        sums = tl.program_id(0) * WIDTH + columns
        tl.store(weight_sums + sums, weight_sum, mask=inside)
        tl.store(bias_sums + sums, bias_sum, mask=inside)

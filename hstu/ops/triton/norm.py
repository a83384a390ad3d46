"""The residual stream with its LayerNorm, and the gated norm with dropout, by Triton kernels.

Each program processes one row at a time and reads it once. It sums the gradients of the affine weights in registers and
writes one row of partial sums, [programs, WIDTH]; PyTorch adds these, so there are no atomics. The dropout mask is a
function of seed, row and column, so that only the seed is saved for backward.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu.ops.kernels import AddLayerNormInputs, GateInputs, Gradient
from hstu.ops.triton.launch import row_launcher
from hstu.ops.triton.primitives import elements, heads, matrix, sigmoid, silu_derivative

FORWARD_PROGRAMS = 8 * 132
BACKWARD_PROGRAMS = 4 * 132
"""Largest numbers of programs. All run at once on the 132 multiprocessors of an H100, each with room for 12 or 6."""
GATE_PROGRAMS = 1024
_SEEDS = 1 << 31


def residual_forward(inputs: AddLayerNormInputs) -> tuple[Tensor, Tensor, Tensor]:
    """See :data:`hstu.ops.kernels.AddLayerNormForward`; x and update have any strides."""
    x, update = inputs.x, inputs.update
    total = x if update is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normalized = torch.empty(x.shape, dtype=inputs.dtype, device=x.device)
    statistics = torch.empty(2, len(x), dtype=torch.float32, device=x.device)
    if len(x):
        row_launcher(add_layer_norm_forward, min(FORWARD_PROGRAMS, len(x)), x.shape[1])(
            x=matrix(x),
            num_rows=len(x),
            update=matrix(update),
            weight=inputs.weight,
            bias=inputs.bias,
            total=matrix(total),
            normalized=matrix(normalized),
            mean=statistics[0],
            rstd=statistics[1],
            eps=float(inputs.eps),
            HAS_UPDATE=update is not None,
        )
    return total, normalized, statistics


def residual_backward(
    grad: Tensor, grad_total: Tensor, inputs: AddLayerNormInputs, statistics: Tensor, update_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See :data:`hstu.ops.kernels.AddLayerNormBackward`; the gradients and the sum have any strides."""
    total, weight, bias = inputs.x, inputs.weight, inputs.bias
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    rounded = update_dtype not in (None, total.dtype)
    grad_update = torch.empty(total.shape, dtype=update_dtype, device=total.device) if rounded else None
    programs = min(BACKWARD_PROGRAMS, max(1, len(total)))
    sums = torch.zeros(2, programs, len(weight), dtype=torch.float32, device=total.device)
    if len(total):
        row_launcher(add_layer_norm_backward, programs, total.shape[1])(
            total=matrix(total),
            num_rows=len(total),
            weight=weight,
            mean=statistics[0],
            rstd=statistics[1],
            grad=matrix(grad),
            grad_total=matrix(grad_total),
            grad_x=matrix(grad_x),
            grad_update=matrix(grad_update),
            weight_sums=sums[0],
            bias_sums=sums[1],
            ROUNDED=rounded,
        )
    if update_dtype == total.dtype:
        grad_update = grad_x
    grad_weight, grad_bias = sums.sum(1)
    return grad_x, grad_update, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def gate_forward(inputs: GateInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :data:`hstu.ops.kernels.GateForward`. The mask is a seed of torch's CPU generator, int64 [] on the host."""
    x, config = inputs.x, inputs.config
    seed = torch.randint(_SEEDS, (), device="cpu") if config.dropout > 0 else None
    if seed is not None:  # ranks with equal generators need different masks
        seed = (seed + config.comm.rank * 0x9E3779B1) % _SEEDS
    gated = torch.empty(len(x), len(inputs.weight), dtype=x.dtype, device=x.device)
    if config.comm.tp_size > 1:
        variance, mean = torch.var_mean(x.float(), dim=(1, 2), correction=0)
        statistics = config.combine_statistics(torch.stack([mean, variance]))
    else:
        statistics = torch.empty(2, len(x), dtype=torch.float32, device=x.device)
    if len(x):
        shared = _shared(inputs, inputs.u, statistics, 0 if seed is None else int(seed))
        run = _over_rows(norm_mul_dropout_forward, x)
        run(**shared, out=matrix(gated), eps=float(config.eps), GIVEN=config.comm.tp_size > 1)
    return gated, statistics, seed


def gate_backward(
    grad: Tensor, inputs: GateInputs, statistics: Tensor, dropout_mask: Tensor | None, grad_u: Gradient
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :data:`hstu.ops.kernels.GateBackward`. With ``before_silu``, u is recomputed instead of read."""
    x, weight, bias, config, before_silu = inputs.x, inputs.weight, inputs.bias, inputs.config, grad_u.before_silu
    seed = 0 if dropout_mask is None else int(dropout_mask)
    gated = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    u = inputs.u if before_silu is None else before_silu.value
    sums = torch.zeros(
        2 if before_silu is None else 3, _num_programs(x), len(weight), dtype=torch.float32, device=x.device
    )
    row_sums = torch.empty(2, len(x), dtype=torch.float32, device=x.device)

    def run(which: str) -> None:
        if len(x):
            _over_rows(norm_mul_dropout_backward, x)(
                **_shared(inputs, u, statistics, seed),
                grad=matrix(grad),
                grad_x=heads(grad_x),
                grad_u=heads(grad_u.target),
                gated=gated,
                weight_sums=sums[0],
                bias_sums=sums[1],
                gate_sums=None if before_silu is None else sums[2],
                row_sums=row_sums,
                PASS=which,
                SILU=before_silu is not None,
            )

    if config.comm.tp_size > 1:
        run("sums")
        row_sums = config.comm.all_gather(row_sums).mean(0)
        run("rows")
    else:
        run("all")
    grad_weight, grad_bias, *grad_shift = sums.sum(1)
    if before_silu is not None:
        before_silu.grad_shift.copy_(grad_shift[0].view(x.shape[1:]))
    return gated, grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _shared(inputs: GateInputs, u: Tensor, statistics: Tensor, seed: int) -> dict[str, Any]:
    """Arguments that forward and backward share. u: ``inputs.u``, or its pre-activation."""
    dropout = inputs.config.dropout
    return dict(
        u=heads(u),
        weight=inputs.weight,
        bias=inputs.bias,
        mean=statistics[0],
        rstd=statistics[1],
        num_rows=statistics.shape[1],
        dropout=float(dropout),
        seed=seed,
        DROPPED=dropout > 0,
    )


def _over_rows(kernel: Any, x: Tensor) -> Callable[..., object]:
    launch = row_launcher(kernel, _num_programs(x), x.shape[1] * x.shape[2])
    return partial(launch, x=heads(x), HEAD=x.shape[2])


def _num_programs(x: Tensor) -> int:
    return min(GATE_PROGRAMS, max(1, len(x)))


@triton.jit
def _load(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointers, values, inside):
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["mean", "rstd"])
def add_layer_norm_forward(
    x, update, weight, bias, total, normalized, mean, rstd, num_rows, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_UPDATE: tl.constexpr,
):  # fmt: skip
    """normalized = norm(total) · weight + bias; writes total = x + update if HAS_UPDATE. Grid: (programs,)."""
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = _load(weight + columns, inside)
    shift = _load(bias + columns, inside)
    for row in tl.range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        values = _load(elements(x, row, columns), inside)
        if HAS_UPDATE:
            values += _load(elements(update, row, columns), inside)
            _store(elements(total, row, columns), values, inside)
            # Normalize the rounded sum, because backward and recomputation start from it.
            values = values.to(total.data.dtype.element_ty).to(tl.float32)
        center = tl.sum(values, axis=0) / WIDTH
        centered = tl.where(inside, values - center, 0.0)
        inverse = tl.rsqrt(tl.sum(centered * centered, axis=0) / WIDTH + eps)
        tl.store(mean + row, center)
        tl.store(rstd + row, inverse)
        _store(elements(normalized, row, columns), centered * inverse * scale + shift, inside)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["mean", "rstd"])
def add_layer_norm_backward(
    total, weight, mean, rstd, grad, grad_total, grad_x, grad_update, weight_sums, bias_sums, num_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """grad_x = grad_total + gradient through the norm; grad_update = grad_x if ROUNDED. Grid: (programs,)."""
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = _load(weight + columns, inside)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        values = _load(elements(total, row, columns), inside)
        upstream = _load(elements(grad, row, columns), inside)
        beside_norm = _load(elements(grad_total, row, columns), inside)
        inverse = tl.load(rstd + row)
        normalized = tl.where(inside, (values - tl.load(mean + row)) * inverse, 0.0)
        weight_sum += upstream * normalized
        bias_sum += upstream
        scaled = upstream * scale
        mean_scaled = tl.sum(scaled, axis=0) / WIDTH
        mean_product = tl.sum(scaled * normalized, axis=0) / WIDTH
        of_x = (scaled - mean_scaled - normalized * mean_product) * inverse + beside_norm
        _store(elements(grad_x, row, columns), of_x, inside)
        if ROUNDED:
            _store(elements(grad_update, row, columns), of_x, inside)
    sums = tl.program_id(0) * WIDTH + columns
    tl.store(weight_sums + sums, weight_sum, mask=inside)
    tl.store(bias_sums + sums, bias_sum, mask=inside)


@triton.jit
def _keeps(seed, row, dropout, BLOCK: tl.constexpr):
    """bool [BLOCK]: kept elements. One Philox run yields four numbers: a run per number is slower than the memory."""
    quads = tl.arange(0, BLOCK // 4)
    zero = tl.zeros((BLOCK // 4,), tl.int32)
    a, b, c, d = tl.philox(seed, quads, (zero + row).to(tl.int32), zero, zero)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK,))
    return tl.uint_to_uniform_float(words) >= dropout


@triton.jit
def _elements_of_heads(tensor, row, columns, HEAD: tl.constexpr):
    columns = columns.to(tl.int64)
    of_column = (columns // HEAD) * tensor.stride_head + (columns % HEAD) * tensor.stride_channel
    return tensor.data + tl.cast(row, tl.int64) * tensor.stride_token + of_column


@triton.jit(do_not_specialize=["num_rows", "seed"], do_not_specialize_on_alignment=["mean", "rstd"])
def norm_mul_dropout_forward(
    x, u, weight, bias, out, mean, rstd, num_rows, eps, dropout, seed,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    DROPPED: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """out = dropout((norm(x) · weight + bias) ⊙ u); reads ``mean`` and ``rstd`` if GIVEN, else writes them."""
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = _load(weight + columns, inside)
    shift = _load(bias + columns, inside)
    for row in tl.range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        values = _load(_elements_of_heads(x, row, columns, HEAD), inside)
        if GIVEN:
            center = tl.load(mean + row)
            inverse = tl.load(rstd + row)
        else:
            center = tl.sum(values, axis=0) / WIDTH
            centered = tl.where(inside, values - center, 0.0)
            inverse = tl.rsqrt(tl.sum(centered * centered, axis=0) / WIDTH + eps)
            tl.store(mean + row, center)
            tl.store(rstd + row, inverse)
        result = (values - center) * inverse * scale + shift
        result *= _load(_elements_of_heads(u, row, columns, HEAD), inside)
        if DROPPED:
            result = tl.where(_keeps(seed, row, dropout, BLOCK), result / (1.0 - dropout), 0.0)
        _store(out.data + row * out.stride_row + columns, result, inside)


@triton.jit(do_not_specialize=["num_rows", "seed"], do_not_specialize_on_alignment=["mean", "rstd"])
def norm_mul_dropout_backward(
    x, u, weight, bias, mean, rstd, grad, grad_x, grad_u, gated, weight_sums, bias_sums, gate_sums, row_sums,
    num_rows, dropout, seed,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    DROPPED: tl.constexpr, PASS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Gradients, and the output of forward. Grid: (programs,). PASS "all" computes everything.

    If several ranks share the heads of a row, there are two passes: "sums" writes everything but grad_x, and the means
    over this rank's columns to row_sums [2, T]; "rows" reads the means over all ranks from row_sums and writes grad_x.
    If SILU, the gate is SiLU(u), grad_u is the gradient of u, and gate_sums receives its sums over rows.
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = _load(weight + columns, inside)
    shift = _load(bias + columns, inside)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    gate_sum = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        values = _load(_elements_of_heads(x, row, columns, HEAD), inside)
        upstream = _load(elements(grad, row, columns), inside)
        inverse = tl.load(rstd + row)
        normalized = tl.where(inside, (values - tl.load(mean + row)) * inverse, 0.0)
        if DROPPED:
            factor = tl.where(_keeps(seed, row, dropout, BLOCK), 1.0 / (1.0 - dropout), 0.0)
            upstream *= factor
        gate = _load(_elements_of_heads(u, row, columns, HEAD), inside)
        if SILU:
            share = sigmoid(gate, False)
            slope = silu_derivative(gate, share)
            gate = (gate * share).to(u.data.dtype.element_ty).to(tl.float32)  # same bits as in forward
        if PASS != "rows":
            affine = normalized * scale + shift
            of_gate = upstream * affine
            if SILU:
                of_gate *= slope
                gate_sum += of_gate
            _store(_elements_of_heads(grad_u, row, columns, HEAD), of_gate, inside)
            recomputed = affine * gate
            if DROPPED:
                recomputed *= factor
            _store(gated + row * WIDTH + columns, recomputed, inside)
        upstream *= gate
        weight_sum += upstream * normalized
        bias_sum += upstream
        scaled = upstream * scale
        if PASS == "rows":
            mean_scaled = tl.load(row_sums + row)
            mean_product = tl.load(row_sums + num_rows + row)
        else:
            mean_scaled = tl.sum(scaled, axis=0) / WIDTH
            mean_product = tl.sum(scaled * normalized, axis=0) / WIDTH
        if PASS == "sums":
            tl.store(row_sums + row, mean_scaled)
            tl.store(row_sums + num_rows + row, mean_product)
        else:
            of_x = (scaled - mean_scaled - normalized * mean_product) * inverse
            _store(_elements_of_heads(grad_x, row, columns, HEAD), of_x, inside)
    if PASS != "rows":
        sums = tl.program_id(0) * WIDTH + columns
        tl.store(weight_sums + sums, weight_sum, mask=inside)
        tl.store(bias_sums + sums, bias_sum, mask=inside)
        if SILU:
            tl.store(gate_sums + sums, gate_sum, mask=inside)

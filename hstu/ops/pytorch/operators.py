"""The reference kernels: every operator in plain PyTorch, on any device and in any dtype."""

import platform
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops import kernels
from hstu.ops.comm import LayerComm
from hstu.ops.dropout import draw, scale_of
from hstu.ops.kernels import AddLayerNormInputs, GateConfig, GateInputs, Gradient
from hstu.ops.layout import TokenOrder
from hstu.ops.pytorch import attention, softmax_loss
from hstu.ops.row_update import update_rows


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products. If not, PyTorch takes 2 to 9 times as long as in float32."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their dtype, summed in float32 or wider."""
    return (a.float() @ b.float()).bfloat16() if _needs_float32(a) else a @ b


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, rounded once."""
    if _needs_float32(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).bfloat16()
    return F.linear(x, weight, bias)


def _needs_float32(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not cpu_multiplies_bfloat16()


def project_uvqk(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`hstu.ops.kernels.ProjectionKernels`."""
    projected = linear(x, weight, bias)
    return projected, F.silu(projected)


def add_layer_norm_forward(inputs: AddLayerNormInputs) -> tuple[Tensor, Tensor, Tensor]:
    """See :data:`hstu.ops.kernels.AddLayerNormForward`."""
    x, wide = inputs.x, torch.promote_types(inputs.x.dtype, torch.float32)
    total = x if inputs.update is None else (x + inputs.update).to(x.dtype)
    weight, bias = inputs.weight.to(wide), inputs.bias.to(wide)
    y, mean, rstd = torch.native_layer_norm(total.to(wide), weight.shape, weight, bias, inputs.eps)
    return total, y.to(inputs.dtype), torch.stack([mean, rstd]).squeeze(2)


def add_layer_norm_backward(
    grad: Tensor, grad_total: Tensor, inputs: AddLayerNormInputs, statistics: Tensor, update_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See :data:`hstu.ops.kernels.AddLayerNormBackward`."""
    total, weight, bias = inputs.x, inputs.weight, inputs.bias
    wide = torch.promote_types(total.dtype, torch.float32)
    mean, rstd = statistics.unsqueeze(2)
    through_norm, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad.to(wide), total.to(wide), weight.shape, mean, rstd, weight.to(wide), bias.to(wide), [True] * 3
    )
    grad_x = through_norm.add_(grad_total).to(total.dtype)
    grad_update = None if update_dtype is None else grad_x.to(update_dtype)
    return grad_x, grad_update, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def gate_forward(inputs: GateInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :data:`hstu.ops.kernels.GateForward`; the dropout mask is bool [T, H · d]."""
    x, config = inputs.x, inputs.config
    rows, weight, bias = _wide(x, inputs.weight, inputs.bias)
    normalised, statistics = _normalise(rows, weight, bias, config)
    kept = draw(rows.shape, config.dropout, x.device, config.comm.dropout_stream) if config.dropout > 0 else None
    return _gated(normalised, inputs.u, x.dtype, kept, config), statistics, kept


def gate_backward(
    grad: Tensor, inputs: GateInputs, statistics: Tensor, dropout_mask: Tensor | None, grad_u: Gradient
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :data:`hstu.ops.kernels.GateBackward`."""
    x, u, weight, bias, config = inputs.x, inputs.u, inputs.weight, inputs.bias, inputs.config
    rows, wide_weight, wide_bias = _wide(x, weight, bias)
    normalised = torch.addcmul(wide_bias, _centred(rows, statistics), wide_weight)
    gated = _gated(normalised, u, x.dtype, dropout_mask, config)
    grad = _dropped(grad, dropout_mask, config).view(u.shape)
    grad_u.write(normalised.view(u.shape).mul_(grad))
    grad = (grad.to(rows.dtype) * u).flatten(1)
    if config.comm.tp_size == 1:
        mean, rstd = statistics.unsqueeze(2)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad, rows, wide_weight.shape, mean, rstd, wide_weight, wide_bias, [True] * 3
        )
    else:
        grad_x, grad_weight, grad_bias = _through_norm(grad, rows, wide_weight, statistics, config.comm)
    return gated, grad_x.view(x.shape).to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _wide(x: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
    """Rows [T, H · d] and affine weights in the dtype of the norm."""
    rows = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    return rows, *(tensor.to(rows.dtype) for tensor in affine)


def _normalise(rows: Tensor, weight: Tensor, bias: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
    """LayerNorm of rows whose channels are split over ranks, and its mean and rstd [2, T]."""
    if config.comm.tp_size == 1:
        normalised, mean, rstd = torch.native_layer_norm(rows, weight.shape, weight, bias, config.eps)
        return normalised, torch.stack([mean, rstd]).squeeze(2)
    own_mean = rows.mean(1)
    own_variance = (rows - own_mean[:, None]).square().mean(1)
    statistics = config.combine_statistics(torch.stack([own_mean, own_variance]))
    return torch.addcmul(bias, _centred(rows, statistics), weight), statistics


def _through_norm(
    grad: Tensor, rows: Tensor, weight: Tensor, statistics: Tensor, comm: LayerComm
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows whose channels are split over ranks, and of this rank's weights and biases."""
    centred = _centred(rows, statistics)
    scaled = grad * weight
    own = torch.stack([scaled.mean(1), (scaled * centred).mean(1)])
    along_one, along_row = comm.all_gather(own).mean(0).unsqueeze(2)
    grad_x = (scaled - along_one - centred * along_row) * statistics[1, :, None]
    return grad_x, (grad * centred).sum(0), grad.sum(0)


def _centred(rows: Tensor, statistics: Tensor) -> Tensor:
    mean, rstd = statistics.unsqueeze(2)
    return (rows - mean).mul_(rstd)


def _gated(normalised: Tensor, u: Tensor, dtype: torch.dtype, kept: Tensor | None, config: GateConfig) -> Tensor:
    # Multiplied per head: flattening u, a view of the uvqk projection, would copy it.
    return _dropped((normalised.view(u.shape) * u).flatten(1).to(dtype), kept, config)


def _dropped(rows: Tensor, kept: Tensor | None, config: GateConfig) -> Tensor:
    return rows if kept is None else (rows * kept).mul_(scale_of(config.dropout, rows.device))


def add_positions(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """See :attr:`hstu.ops.kernels.Kernels.add_positions`."""
    return x + F.embedding(positions.clamp(max=len(table) - 1), table)


def jagged_concat(parts: Sequence[Tensor], order: TokenOrder) -> Tensor:
    """See :attr:`hstu.ops.kernels.Kernels.jagged_concat`."""
    return _Permute.apply(torch.cat(list(parts)), order.source, order.inverse)


class _Permute(torch.autograd.Function):
    """Rows in another order. The gradient of a permutation is its inverse: a gather, not a scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(source, inverse)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        source, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, source), None, None


REFERENCE_KERNELS = kernels.Kernels(
    attention=kernels.AttentionKernels(attention.forward, attention.backward, serves_ranges=True),
    add_layer_norm=kernels.AddLayerNormKernels(add_layer_norm_forward, add_layer_norm_backward),
    project_uvqk=kernels.ProjectionKernels(project_uvqk, F.silu),
    norm_mul_dropout=kernels.GateKernels(gate_forward, gate_backward),
    sampled_softmax_loss=softmax_loss.sampled_softmax_loss,
    l2_normalize=softmax_loss.l2_normalize,
    pool_softmax_loss=partial(softmax_loss.pool_softmax_loss, softmax_loss.in_blocks),
    jagged_concat=jagged_concat,
    add_positions=add_positions,
    update_rows=update_rows,
    served_by=dict.fromkeys(kernels.OPERATORS, kernels.ServedBy(kernels.Backend.PYTORCH)),
)

"""The residual stream with its LayerNorm, and the gated norm, in plain PyTorch. Computed in float32 at least."""

import torch
from torch import Tensor

from hstu.ops.comm import LayerComm
from hstu.ops.dropout import draw, scale_of
from hstu.ops.kernels import AddLayerNormInputs, GateConfig, GateInputs, Gradient


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

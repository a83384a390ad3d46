"""See :mod:`hstu.ops.norm_mul_dropout`."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu.ops.dropout import draw, scale_of
from hstu.ops.norm_mul_dropout import GateRule
from hstu.ops.ranks import Ranks


def forward(x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, rule: GateRule) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :class:`hstu.ops.norm_mul_dropout.GateKernels`; the pattern is bool [T, H · d]."""
    rows, weight, bias = _wide(x, weight, bias)
    normalised, statistics = _normalise(rows, weight, bias, rule)
    kept = draw(rows.shape, rule.dropout, x.device, rule.ranks) if rule.dropout > 0 else None
    return _gated(normalised, u, x.dtype, kept, rule), statistics, kept


def backward(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    rule: GateRule,
    statistics: Tensor,
    pattern: Tensor | None,
    grad_u: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :class:`hstu.ops.norm_mul_dropout.GateKernels`."""
    rows, wide_weight, wide_bias = _wide(x, weight, bias)
    normalised = torch.addcmul(wide_bias, _centred(rows, statistics), wide_weight)
    gated = _gated(normalised, u, x.dtype, pattern, rule)
    grad = _dropped(grad, pattern, rule).view(u.shape)
    grad_u.copy_(normalised.view(u.shape).mul_(grad))
    grad = (grad.to(rows.dtype) * u).flatten(1)
    if rule.ranks.count == 1:
        mean, inverse_std = statistics.unsqueeze(2)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad, rows, wide_weight.shape, mean, inverse_std, wide_weight, wide_bias, [True] * 3
        )
    else:
        grad_x, grad_weight, grad_bias = _through_norm(grad, rows, wide_weight, statistics, rule.ranks)
    return gated, grad_x.view(x.shape).to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _wide(x: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
    """Rows [T, H · d] and affine weights in the type that the norm is computed in."""
    rows = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    return rows, *(tensor.to(rows.dtype) for tensor in affine)


def _normalise(rows: Tensor, weight: Tensor, bias: Tensor, rule: GateRule) -> tuple[Tensor, Tensor]:
    """LayerNorm of rows that lie over the ranks; mean and inverse deviation [2, T]."""
    if rule.ranks.count == 1:
        normalised, mean, inverse_std = torch.native_layer_norm(rows, weight.shape, weight, bias, rule.eps)
        return normalised, torch.stack([mean, inverse_std]).squeeze(2)
    own_mean = rows.mean(1)
    own_variance = (rows - own_mean[:, None]).square().mean(1)
    statistics = rule.over_all_heads(torch.stack([own_mean, own_variance]))
    return torch.addcmul(bias, _centred(rows, statistics), weight), statistics


def _through_norm(
    grad: Tensor, rows: Tensor, weight: Tensor, statistics: Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows that lie over the ranks, and of this rank's weights and biases."""
    centred = _centred(rows, statistics)
    scaled = grad * weight
    own = torch.stack([scaled.mean(1), (scaled * centred).mean(1)])
    along_one, along_row = ranks.gather(own).mean(0).unsqueeze(2)
    grad_x = (scaled - along_one - centred * along_row) * statistics[1, :, None]
    return grad_x, (grad * centred).sum(0), grad.sum(0)


def _centred(rows: Tensor, statistics: Tensor) -> Tensor:
    mean, inverse_std = statistics.unsqueeze(2)
    return (rows - mean).mul_(inverse_std)


def _gated(normalised: Tensor, u: Tensor, dtype: torch.dtype, kept: Tensor | None, rule: GateRule) -> Tensor:
    # Multiplied head by head: flattening u, a view of the uvqk projection, would copy it.
    return _dropped((normalised.view(u.shape) * u).flatten(1).to(dtype), kept, rule)


def _dropped(rows: Tensor, kept: Tensor | None, rule: GateRule) -> Tensor:
    return rows if kept is None else (rows * kept).mul_(scale_of(rule.dropout, rows.device))

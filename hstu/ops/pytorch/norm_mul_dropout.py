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
    centred, statistics = _centre(rows, rule.eps, rule.ranks)
    normalised = torch.addcmul(bias, centred, weight)
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
    mean, inverse_std = statistics.unsqueeze(2)
    centred = (rows - mean).mul_(inverse_std)
    normalised = torch.addcmul(wide_bias, centred, wide_weight)
    gated = _gated(normalised, u, x.dtype, pattern, rule)
    grad = _dropped(grad, pattern, rule).view(u.shape).to(rows.dtype)
    grad_u.copy_(grad * normalised.view(u.shape))
    grad = (grad * u).flatten(1)
    grad_weight, grad_bias = (grad * centred).sum(0), grad.sum(0)
    grad = grad.mul_(wide_weight)
    own = torch.stack([grad.mean(1), (grad * centred).mean(1)])
    along_one, along_row = rule.ranks.gather(own).mean(0).unsqueeze(2)
    grad_x = grad.sub_(along_one).sub_(centred.mul_(along_row)).mul_(inverse_std)
    return gated, grad_x.view(x.shape).to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _wide(x: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
    """Rows [T, H · d] and affine weights in the type that the norm is computed in."""
    rows = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    return rows, *(tensor.to(rows.dtype) for tensor in affine)


def _centre(rows: Tensor, eps: float, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Rows without mean and deviation, and these: mean and inverse deviation [2, T] of rows that lie over the ranks."""
    if ranks.count == 1:
        centred, mean, inverse_std = torch.native_layer_norm(rows, rows.shape[1:], None, None, eps)
        return centred, torch.stack([mean, inverse_std]).squeeze(2)
    # Mean and mean square about it, not the plain sum of squares: that cancels where the mean is large.
    own_mean = rows.mean(1)
    own_variance = (rows - own_mean[:, None]).square().mean(1)
    means, variances = ranks.gather(torch.stack([own_mean, own_variance])).unbind(1)
    mean = means.mean(0)
    inverse_std = torch.rsqrt((variances + (means - mean).square()).mean(0) + eps)
    return (rows - mean[:, None]).mul_(inverse_std[:, None]), torch.stack([mean, inverse_std])


def _gated(normalised: Tensor, u: Tensor, dtype: torch.dtype, kept: Tensor | None, rule: GateRule) -> Tensor:
    # Multiplied head by head: flattening u, a view of the uvqk projection, would copy it.
    return _dropped((normalised.view(u.shape) * u).flatten(1).to(dtype), kept, rule)


def _dropped(rows: Tensor, kept: Tensor | None, rule: GateRule) -> Tensor:
    return rows if kept is None else rows * kept * scale_of(rule.dropout, rows.device)

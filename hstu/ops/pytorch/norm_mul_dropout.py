"""See :mod:`hstu.ops.norm_mul_dropout`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.dropout import dropout as apply_dropout
from hstu.ops.norm_mul_dropout import SplitHeads


def norm_mul_dropout(
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float,
    training: bool,
    split_heads: SplitHeads | None = None,
) -> Tensor:
    """See :func:`hstu.ops.norm_mul_dropout.norm_mul_dropout`."""
    rows = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    weight, bias = weight.to(rows.dtype), bias.to(rows.dtype)
    if split_heads is None:
        normalised = F.layer_norm(rows, weight.shape, weight, bias, eps)
    else:
        normalised = _SplitLayerNorm.apply(rows, weight, bias, eps, split_heads)
    # Multiplied head by head: flattening u, a view of the uvqk projection, would copy it.
    gated = (normalised.view(u.shape) * u).flatten(1).to(x.dtype)
    return apply_dropout(gated, dropout, training, stream=None if split_heads is None else split_heads.rank)


class _SplitLayerNorm(torch.autograd.Function):
    """LayerNorm of rows [T, n · ranks] of which each rank has n columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, split: SplitHeads) -> Tensor:
        # Mean and mean square about it, not the plain sum of squares: that cancels where the mean is large.
        own_mean = x.mean(1)
        own_variance = (x - own_mean[:, None]).square().mean(1)
        means, variances = split.gather(torch.stack([own_mean, own_variance])).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        inverse_std = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.split = split
        normalised = (x - mean[:, None]) * inverse_std[:, None]
        return torch.addcmul(bias, normalised, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        (gradient,) = gradients
        normalised = (x - mean[:, None]) * inverse_std[:, None]
        scaled = gradient * weight
        own = torch.stack([scaled.mean(1), (scaled * normalised).mean(1)])
        along_one, along_row = ctx.split.gather(own).mean(0)
        grad_x = (scaled - along_one[:, None] - normalised * along_row[:, None]) * inverse_std[:, None]
        return grad_x, (gradient * normalised).sum(0), gradient.sum(0), None, None

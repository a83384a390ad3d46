"""See :mod:`hstu.ops.norm_mul_dropout`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.dropout import dropout as apply_dropout


def norm_mul_dropout(
    x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float, training: bool
) -> Tensor:
    """See :func:`hstu.ops.norm_mul_dropout.norm_mul_dropout`."""
    rows = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    normalised = F.layer_norm(rows, weight.shape, weight.to(rows.dtype), bias.to(rows.dtype), eps)
    # Multiplied head by head: flattening u, a view of the uvqk projection, would copy it.
    gated = (normalised.view(u.shape) * u).flatten(1).to(x.dtype)
    return apply_dropout(gated, dropout, training)

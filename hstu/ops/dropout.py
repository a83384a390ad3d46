"""Dropout that draws 16 bits an element: on a CPU torch's own draws one double each and takes five times as long."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_RESOLUTION = 1 << 16


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element with probability p (on a CPU rounded to 2⁻¹⁶) and scale the others so that the mean stays.

    Draws from torch's generator of x's device, hence follows torch.manual_seed and is repeated by checkpointing.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = round(p * _RESOLUTION)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _RESOLUTION // 2
    return x * keep * (_RESOLUTION / (_RESOLUTION - dropped))

"""Dropout that draws 16 bits an element: on a CPU torch's own draws one double each and takes five times as long."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.ranks import Ranks

_RESOLUTION = 1 << 16
_SEEDS = 1 << 62


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element with probability p (on a CPU rounded to 2⁻¹⁶) and scale the others so that the mean stays."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    return x * draw(x.shape, p, x.device) * scale_of(p, x.device)


def draw(shape: torch.Size, p: float, device: torch.device, ranks: Ranks | None = None) -> Tensor:
    """Which elements stay, if each is dropped with probability p: bool of this shape.

    Follows torch's generator of the CPU, on all devices: set that back and the same is drawn again, no device is asked.
    ``ranks``: those whose generators agree draw a pattern each, and their generators still agree afterwards.
    """
    generator = None if ranks is None or ranks.count == 1 else _generator_of(ranks.rank, device)
    if device.type != "cpu":
        generator = generator or _generator_of(0, device)
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - p, generator=generator)
    elements = shape.numel()
    words = torch.empty(-(-elements // 4), dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
    return words.view(torch.int16)[:elements].view(shape) >= _dropped(p) - _RESOLUTION // 2


def scale_of(p: float, device: torch.device) -> float:
    """What multiplies the elements that stay."""
    return _RESOLUTION / (_RESOLUTION - _dropped(p)) if device.type == "cpu" else 1 / (1 - p)


def _dropped(p: float) -> int:
    """Of the values of 16 bits."""
    return round(p * _RESOLUTION)


def _generator_of(stream: int, device: torch.device) -> torch.Generator:
    """A generator for one use, seeded from ``stream`` and torch's generator of the CPU."""
    drawn = int(torch.randint(_SEEDS, (), device="cpu"))
    words = np.random.SeedSequence([drawn, stream]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0]))

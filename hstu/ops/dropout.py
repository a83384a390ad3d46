"""Dropout that draws 16 bits an element: on a CPU torch's own draws one double each and takes five times as long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_RESOLUTION = 1 << 16
_SEEDS = 1 << 62


def dropout(x: Tensor, p: float, training: bool, stream: int | None = None) -> Tensor:
    """Zero each element with probability p (on a CPU rounded to 2⁻¹⁶) and scale the others so that the mean stays.

    Draws from torch's generator of x's device, hence follows torch.manual_seed and is repeated by checkpointing.
    ``stream``: ranks whose generators agree draw different patterns on different streams, and their generators still
    agree afterwards.
    """
    if not training or p == 0:
        return x
    generator = None if stream is None else _generator_of(stream, x.device)
    if x.device.type != "cpu":
        if generator is None:
            return F.dropout(x, p)
        return x * torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p)
    draws = draw(x.numel(), p, generator)
    return x * (draws.words.view(x.shape) >= draws.least) * draws.scale


@dataclass(frozen=True)
class Draws:
    """Which elements a dropout on a CPU keeps: those whose word is not below ``least``, multiplied by ``scale``."""

    words: Tensor
    """int16 [elements]."""
    least: int
    scale: float


def draw(elements: int, p: float, generator: torch.Generator | None = None) -> Draws:
    """Draw for a dropout of probability p, from torch's generator of the CPU unless another is given."""
    dropped = round(p * _RESOLUTION)
    words = torch.empty(-(-elements // 4), dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
    scale = _RESOLUTION / (_RESOLUTION - dropped)
    return Draws(words.view(torch.int16)[:elements], dropped - _RESOLUTION // 2, scale)


def _generator_of(stream: int, device: torch.device) -> torch.Generator:
    """A generator for one use, seeded from ``stream`` and torch's generator of the CPU: no device is asked."""
    drawn = int(torch.randint(_SEEDS, (), device="cpu"))
    words = np.random.SeedSequence([drawn, stream]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0]))

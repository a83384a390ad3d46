"""See :mod:`hstu.ops.positions`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def add_positions(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """See :func:`hstu.ops.positions.add_positions`."""
    return x + F.embedding(positions.clamp(max=len(table) - 1), table)

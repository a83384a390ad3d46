"""Initial rows of ids: a function of the seed, the table's name and the id, on every rank and at every time."""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor

from hstu.parallel.dynamic.hashing import mix

_QUANTILES = 1 << 16


def initial_rows(ids: Tensor, dim: int, init_std: float, table_key: int) -> Tensor:
    """Rows of int64 ids [n]: float32 [n, dim], N(0, init_std²) to within 65,536 quantiles (±4.3 init_std at most).

    The numbers are looked up, not computed, so that they have the same bits on every device.
    """
    words = -(-dim // 4)
    keys = mix(ids ^ table_key)[:, None] + torch.arange(words, device=ids.device)
    quantiles = mix(keys).view(torch.int16).to(torch.int32) + _QUANTILES // 2
    return (_normal_quantiles(ids.device)[quantiles] * init_std)[:, :dim]


def table_key(seed: int, table: str) -> int:
    """What tells the rows of one table and one run from those of others: an int64."""
    digest = hashlib.blake2b(f"{seed}/{table}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@cache
def _normal_quantiles(device: torch.device) -> Tensor:
    """float32 [65536]: the middle of each of 65,536 equally likely parts of the standard normal distribution."""
    quantiles = torch.special.ndtri((torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES)
    return quantiles.float().to(device)  # computed on the CPU, for the same bits everywhere

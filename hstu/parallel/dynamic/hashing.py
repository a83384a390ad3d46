"""Hashes of id tensors on any device, and the initial rows that are drawn by them."""

import hashlib
import math
from functools import cache

import torch
from torch import Tensor

_WORD = 1 << 64


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word


_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_INVERSES = tuple(pow(factor, -1, _WORD) for factor in _FACTORS)
_QUANTILES = 1 << 16


def mix(ids: Tensor) -> Tensor:
    """Hash int64 ids bijectively, with the bits of hstu.base.hashing.splitmix64 (torch has no uint64 arithmetic)."""
    bits = ids + _signed(_GAMMA)
    bits = (bits ^ _shift_right(bits, _SHIFTS[0])) * _signed(_FACTORS[0])
    bits = (bits ^ _shift_right(bits, _SHIFTS[1])) * _signed(_FACTORS[1])
    return bits ^ _shift_right(bits, _SHIFTS[2])


def unmix(bits: Tensor) -> Tensor:
    """Invert ``mix``."""
    ids = _undo_xor_shift(bits, _SHIFTS[2]) * _signed(_INVERSES[1])
    ids = _undo_xor_shift(ids, _SHIFTS[1]) * _signed(_INVERSES[0])
    return _undo_xor_shift(ids, _SHIFTS[0]) - _signed(_GAMMA)


def in_unsigned_order(bits: Tensor) -> Tensor:
    """Map bits to int64 values that compare like the same bits in uint64."""
    return bits ^ torch.iinfo(torch.int64).min


def _shift_right(bits: Tensor, places: int) -> Tensor:
    """Shift logically, without sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _undo_xor_shift(bits: Tensor, places: int) -> Tensor:
    """Return ``x`` of ``x ^ (x >> places)``, for places > 21."""
    return bits ^ _shift_right(bits, places) ^ _shift_right(bits, 2 * places)


def table_key(seed: int, table: str) -> int:
    """Return an int64 that gives each table of each run its own initial rows."""
    digest = hashlib.blake2b(f"{seed}/{table}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def initial_rows(ids: Tensor, dim: int, init_std: float, table_key: int, quantiles: Tensor) -> Tensor:
    """Return rows for int64 ids [n]: float32 [n, dim], equal for equal key and id on every rank and device.

    Numbers of the distribution with these ``quantiles`` (see ``quantiles_of``), times init_std. A lookup table replaces
    arithmetic, so that every device gives the same bits.
    """
    return quantiles[_drawn(mix(ids ^ table_key), dim)] * init_std


def _drawn(keys: Tensor, dim: int) -> Tensor:
    """Draw from [0, 65536) by int64 keys [n]: int32 [n, dim]."""
    keys = keys[:, None] + torch.arange(-(-dim // 4), device=keys.device)
    return (mix(keys).view(torch.int16).to(torch.int32) + _QUANTILES // 2)[:, :dim]


@cache
def quantiles_of(initializer: str, device: torch.device) -> Tensor:
    """Return float32 [65536]: midpoints of 65,536 equally likely parts of a distribution of mean 0 and deviation 1.

    ``initializer``: see DynamicEmbeddingArgs. normal reaches ±4.3, uniform ±√3; zeros has zeros alone.
    """
    parts = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    values = {"normal": torch.special.ndtri(parts), "uniform": (2 * parts - 1) * math.sqrt(3), "zeros": 0 * parts}
    return values[initializer].float().to(device)  # computed on the CPU, for the same bits on every device

"""hstu.data.hashing's SplitMix64 on tensors of any device, and back; on int64, as torch has no uint64 arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 1 << 64


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word


_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_INVERSES = tuple(pow(factor, -1, _WORD) for factor in _FACTORS)


def mix(ids: Tensor) -> Tensor:
    """A bijective hash of int64 ids: the bits of hstu.data.hashing.splitmix64, as int64."""
    bits = ids + _signed(_GAMMA)
    bits = (bits ^ _shifted(bits, _SHIFTS[0])) * _signed(_FACTORS[0])
    bits = (bits ^ _shifted(bits, _SHIFTS[1])) * _signed(_FACTORS[1])
    return bits ^ _shifted(bits, _SHIFTS[2])


def unmix(bits: Tensor) -> Tensor:
    """The ids that ``mix`` has hashed."""
    ids = _unshifted(bits, _SHIFTS[2]) * _signed(_INVERSES[1])
    ids = _unshifted(ids, _SHIFTS[1]) * _signed(_INVERSES[0])
    return _unshifted(ids, _SHIFTS[0]) - _signed(_GAMMA)


def in_unsigned_order(bits: Tensor) -> Tensor:
    """Int64 that compare as the same bits do without a sign."""
    return bits ^ torch.iinfo(torch.int64).min


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Logical shift to the right."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _unshifted(bits: Tensor, places: int) -> Tensor:
    """What ``x`` was in ``x ^ (x >> places)``, for places > 21."""
    return bits ^ _shifted(bits, places) ^ _shifted(bits, 2 * places)

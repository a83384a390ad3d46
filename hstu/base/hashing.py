"""Vectorised SplitMix64: hashes that are equal on every machine, and counter-based random numbers.

The k-th number of a stream is computed without its predecessors. Keyed by a sample's index in the epoch, the sample
gets the same draws on any rank and worker.
Source: G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (its mix64,
variant 13 of D. Stafford).
"""

import numpy as np
from numpy.typing import ArrayLike

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def splitmix64(values: ArrayLike) -> np.ndarray:
    """Hash 64-bit integers bijectively. Returns uint64 of the shape of ``values``, at least 1-D."""
    # At least 1-D, because NumPy warns of the intended overflow for scalars but not for arrays.
    bits = np.atleast_1d(_as_uint64(values)) + _GOLDEN_GAMMA
    bits ^= bits >> _SHIFTS[0]
    bits *= _FACTORS[0]
    bits ^= bits >> _SHIFTS[1]
    bits *= _FACTORS[1]
    bits ^= bits >> _SHIFTS[2]
    return bits


def random_bits(*counters: ArrayLike) -> np.ndarray:
    """Random uint64 for each combination of integer counters, which broadcast.

    ``random_bits(seed, epoch, ordinals[:, None], np.arange(n))`` has the shape [len(ordinals), n].
    """
    state = np.zeros(1, dtype=np.uint64)
    for counter in counters:
        state = splitmix64(state ^ _as_uint64(counter))
    return state


def random_uniform(*counters: ArrayLike) -> np.ndarray:
    """Random float64 in [0, 1), with the counters of random_bits."""
    return (random_bits(*counters) >> np.uint64(11)) / 2.0**53


def random_below(bound: int, bits: np.ndarray) -> np.ndarray:
    """Map uint32 ``bits`` to int64 in [0, bound), bound <= 2^32. Each probability is within 2^-32 of 1 / bound."""
    scaled = bits.astype(np.uint64)
    scaled *= np.uint64(bound)
    scaled >>= np.uint64(32)
    return scaled.view(np.int64)


def hash_ids(ids: np.ndarray, rows: int) -> np.ndarray:
    """Hash each id, even if it is below ``rows``, to a row in [0, rows), int64."""
    return (splitmix64(ids) % np.uint64(rows)).astype(np.int64)


def hash_strings(strings: np.ndarray) -> np.ndarray:
    """Hash each string of a 1-D array to uint64, independent of the array's item size."""
    fixed = np.ascontiguousarray(strings, dtype=np.str_)
    width = fixed.dtype.itemsize // 4
    characters = fixed.view(np.uint32).reshape(len(fixed), width)
    state = np.zeros(len(fixed), dtype=np.uint64)
    for column in characters.T:
        state = np.where(column > 0, splitmix64(state ^ column), state)
    return state


def _as_uint64(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    return array if array.dtype == np.uint64 else array.astype(np.int64).astype(np.uint64)

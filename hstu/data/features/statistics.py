"""Statistics of columns of numbers: exact, in bounded memory for any number of values, and without randomness.

Those of what a run trains on leave held-out events out, so that none has a part in what a model reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hstu.data.sampling.samples import SampleTable
from hstu.data.store.layout import NumberStatistics
from hstu.data.store.sequence_store import SequenceStore

_CHUNK = 1 << 20
NUM_QUANTILES = 65
"""Quantiles of a column, the least and the largest value among them."""
_HALF = 1 << 16


def statistics_of_numbers(values: np.ndarray) -> NumberStatistics:
    """``values``: float32 [n, width], NaN where one is missing and finite elsewhere."""
    count, mean, std = _moments(values, lambda known: known)
    missing = len(values) - count
    if values.shape[1] > 1:
        return NumberStatistics(count, missing, mean, std)
    _, (log_mean,), (log_std,) = _moments(values, signed_log)
    return NumberStatistics(count, missing, mean, std, log_mean, log_std, _quantiles(values[:, 0], count))


def signed_log(values: np.ndarray) -> np.ndarray:
    """sign(x) log(1 + |x|)."""
    return np.sign(values) * np.log1p(np.abs(values))


def _moments(values: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> tuple[int, list[float], list[float]]:
    """(rows that have values, mean, standard deviation) of a function of each component; 0 without any rows."""
    count, total, squares = 0, np.zeros(values.shape[1]), np.zeros(values.shape[1])
    for known in _known(values):
        count += len(known)
        total += function(known).sum(axis=0)
    mean = total / max(count, 1)
    for known in _known(values):
        squares += ((function(known) - mean) ** 2).sum(axis=0)
    return count, mean.tolist(), np.sqrt(squares / max(count, 1)).tolist()


def _known(values: np.ndarray) -> Iterator[np.ndarray]:
    """float64 chunks of the rows that have values."""
    rows = max(_CHUNK // values.shape[1], 1)
    for start in range(0, len(values), rows):
        chunk = values[start : start + rows]
        yield chunk[~np.isnan(chunk[:, 0])].astype(np.float64)


def _quantiles(values: np.ndarray, count: int) -> list[float]:
    """The values at equally distant ranks, in two passes: the upper halves of their bits are counted, then the lower.

    values: float32 [n]. count: how many of them are no NaN.
    """
    ranks = np.rint(np.linspace(0, max(count - 1, 0), NUM_QUANTILES)).astype(np.int64)
    if not count:
        return [0.0] * NUM_QUANTILES
    upper = np.zeros(_HALF, dtype=np.int64)
    for bits in _ordered_bits(values):
        upper += np.bincount(bits >> 16, minlength=_HALF)
    ends = np.cumsum(upper)
    wanted = np.searchsorted(ends, ranks, side="right")
    halves, place = np.unique(wanted, return_inverse=True)
    lower = np.zeros((len(halves), _HALF), dtype=np.int64)
    for bits in _ordered_bits(values):
        row = np.minimum(np.searchsorted(halves, bits >> 16), len(halves) - 1)
        among = halves[row] == bits >> 16
        lower += np.bincount(row[among] * _HALF + (bits[among] & 0xFFFF), minlength=lower.size).reshape(lower.shape)
    before = ranks - (ends[wanted] - upper[wanted])
    low = np.array(
        [np.searchsorted(np.cumsum(lower[row]), rank, side="right") for row, rank in zip(place, before, strict=True)]
    )
    keys = (halves[place] << 16 | low).astype(np.uint32)
    return _from_ordered_bits(keys).astype(np.float64).tolist()


def _ordered_bits(values: np.ndarray) -> Iterator[np.ndarray]:
    """Chunks of the values that are no NaN as int64 in [0, 2^32) that are in the order of the values."""
    for start in range(0, len(values), _CHUNK):
        chunk = np.ascontiguousarray(values[start : start + _CHUNK])
        bits = chunk[~np.isnan(chunk)].view(np.uint32)
        negative = bits >> 31 == 1
        yield np.where(negative, ~bits, bits | np.uint32(1 << 31)).astype(np.int64)


def _from_ordered_bits(keys: np.ndarray) -> np.ndarray:
    """float32 values of ordered bits, uint32."""
    positive = keys >> 31 == 1
    return np.where(positive, keys ^ np.uint32(1 << 31), ~keys).astype(np.uint32).view(np.float32)


def training_statistics(
    store: SequenceStore, names: Sequence[str], samples: SampleTable
) -> dict[str, NumberStatistics]:
    """Of numbers of events: those of the histories of the training ``samples``, also where no sample has their oldest.

    Of numbers of items, which are no events: those of all items.
    """
    found, events = {}, None
    for name in names:
        statistics = store.features[name].statistics
        if name in store.event_number_features:
            events = trained_events(samples, store.num_events) if events is None else events
            statistics = statistics_of_numbers(store.sequence(name)[events][:, None])
        assert statistics is not None
        found[name] = statistics
    return found


def trained_events(samples: SampleTable, num_events: int) -> np.ndarray:
    """bool [E]: which events lie in the history of a sample, between the user's first event and the sample's last."""
    changes = np.zeros(num_events + 1, dtype=np.int64)
    np.add.at(changes, samples.history_begin, 1)
    np.add.at(changes, samples.stop, -1)
    return changes.cumsum()[:-1] > 0

"""Statistics of numeric columns, deterministic and in bounded memory for any number of values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hstu.data.sampling.samples import SampleTable
from hstu.data.store.layout import NumberStatistics
from hstu.data.store.sequence_store import SequenceStore

_CHUNK = 1 << 20
NUM_QUANTILES = 65
"""Quantiles of a column, from the smallest to the largest value."""
_MOST_RANKED = 1 << 24
"""Largest number of values that are sorted for quantiles."""


def statistics_of_numbers(values: np.ndarray) -> NumberStatistics:
    """Statistics of ``values``: float32 [n, width], NaN where missing and finite elsewhere."""
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
    """(rows with values, mean, standard deviation) of a function of each component; 0 without such rows."""
    count, total, squares = 0, np.zeros(values.shape[1]), np.zeros(values.shape[1])
    for known in _known(values):
        count += len(known)
        total += function(known).sum(axis=0)
    mean = total / max(count, 1)
    for known in _known(values):
        squares += ((function(known) - mean) ** 2).sum(axis=0)
    return count, mean.tolist(), np.sqrt(squares / max(count, 1)).tolist()


def _known(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yields float64 chunks of the rows that have values."""
    rows = max(_CHUNK // values.shape[1], 1)
    for start in range(0, len(values), rows):
        chunk = values[start : start + rows]
        yield chunk[~np.isnan(chunk[:, 0])].astype(np.float64)


def _quantiles(values: np.ndarray, count: int) -> list[float]:
    """Values at equally spaced ranks of float32 [n] ``values``, of which ``count`` are not NaN. In a column longer than
    _MOST_RANKED, only the smallest and largest are exact; the others use every k-th value."""
    if not count:
        return [0.0] * NUM_QUANTILES
    chosen = np.asarray(values[:: -(-len(values) // _MOST_RANKED)])
    known = np.sort(chosen[~np.isnan(chosen)])
    if not len(known):
        known = np.fmin.reduce(values, keepdims=True)
    quantiles = known[np.rint(np.linspace(0, len(known) - 1, NUM_QUANTILES)).astype(np.int64)].astype(np.float64)
    quantiles[0], quantiles[-1] = np.fmin.reduce(values), np.fmax.reduce(values)
    return quantiles.tolist()


def training_statistics(
    store: SequenceStore, names: Sequence[str], samples: SampleTable
) -> dict[str, NumberStatistics]:
    """Statistics of numbers: of items over all items, of events over the histories of the training ``samples``.
    Histories include events that truncation removes from the samples. Held-out events have no influence."""
    found = {name: store.features[name].statistics for name in names}
    if of_events := [name for name in names if name in store.event_number_features]:
        changes = np.zeros(store.num_events + 1, dtype=np.int64)
        np.add.at(changes, samples.history_begin, 1)
        np.add.at(changes, samples.stop, -1)
        is_trained = changes.cumsum()[:-1] > 0
        found |= {name: statistics_of_numbers(store.sequence(name)[is_trained][:, None]) for name in of_events}
    return {name: statistics for name, statistics in found.items() if statistics is not None}

"""Statistics of numbers over what a run trains on, so that no held-out event has a part in what a model reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hstu.data.features.number_statistics import statistics_of_numbers
from hstu.data.sampling.samples import SampleTable
from hstu.data.store.layout import NumberStatistics
from hstu.data.store.sequence_store import SequenceStore


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

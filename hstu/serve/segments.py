"""Which segment of the users or items each prediction of an evaluation belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hstu.base.errors import ConfigError, DataError
from hstu.config.problems import did_you_mean
from hstu.data.store.sequence_store import SequenceStore
from hstu.serve.histories import stored_vocabulary
from hstu.serve.loaded import LoadedModel
from hstu.train.inference import InferenceSource
from hstu.train.observations import Observations

HISTORY_BOUNDS = (0, 10, 20, 50, 100, 200, 500, 1000)
"""Where the segments of the length of the history begin."""
_DECILES = 10


@dataclass(frozen=True)
class Segmentation:
    """N predictions, each in one segment."""

    names: list[str]
    """In the order in which they are shown."""
    of_row: np.ndarray
    """int64 [N]: index into ``names``."""


def segmentation(by: str, loaded: LoadedModel, observations: Observations) -> Segmentation:
    """Divide predictions by a property of their user or item.

    history: events before the item that the model has read, at most max_sequence_length. popularity: ten segments of
    equally many items, by the events that an item has in the training samples; items without any are a segment of
    their own. cold: whether the item is in any training sample. Else a contextual feature of the data: its value.

    Raises ConfigError for another name, DataError if the data that the model was trained on is needed and not there.
    """
    source = loaded.with_data()
    if by == "history":
        return _of_history(observations.history)
    if by in ("popularity", "cold"):
        counts = np.append(_training_counts(loaded, source), 0)  # for items of eval_dataset_path alone
        found = _deciles(counts) if by == "popularity" else _cold(counts)
        codes = np.minimum(source.item_codes(observations.items), len(counts) - 2)
        is_known = loaded.model_ids(codes) == observations.items
        return Segmentation(found.names, found.of_row[np.where(is_known, codes, len(counts) - 1)])
    features = source.eval_store.contextual_features
    if by not in features:
        allowed = ("history", "popularity", "cold", *features)
        raise ConfigError(
            f"segments: {by!r} is no segment of {source.eval_store.path}; allowed: {', '.join(allowed)}"
            f"{did_you_mean(by, allowed)}"
        )
    return _of_feature(source.eval_store, by, observations.users)


def _of_history(lengths: np.ndarray) -> Segmentation:
    ends = [f"{end - 1}" for end in HISTORY_BOUNDS[1:]]
    names = [f"{first}-{last}" for first, last in zip(HISTORY_BOUNDS, ends, strict=False)]
    return Segmentation([*names, f"{HISTORY_BOUNDS[-1]}+"], np.searchsorted(HISTORY_BOUNDS, lengths, side="right") - 1)


def _of_feature(store: SequenceStore, name: str, users: np.ndarray) -> Segmentation:
    raw = store.raw_ids(name) if store.feature(name).has_vocab else np.arange(store.cardinality(name))
    return Segmentation([str(value) for value in raw], np.asarray(store.context(name)[users], dtype=np.int64))


def _deciles(counts: np.ndarray) -> Segmentation:
    """Of items, by their numbers of training events."""
    trained = np.flatnonzero(counts)
    order = trained[np.argsort(counts[trained], kind="stable")]
    of_item = np.zeros(len(counts), dtype=np.int64)
    of_item[order] = 1 + np.arange(len(order)) * _DECILES // max(1, len(order))
    names = ["no events"]
    for decile in range(1, _DECILES + 1):
        own = counts[of_item == decile]
        names.append(f"{decile}: {own.min():,}-{own.max():,} events" if len(own) else f"{decile}: no items")
    return Segmentation(names, of_item)


def _cold(counts: np.ndarray) -> Segmentation:
    return Segmentation(["trained", "cold"], (counts == 0).astype(np.int64))


def _training_counts(loaded: LoadedModel, source: InferenceSource) -> np.ndarray:
    """int64 [items] by the codes of ``source``: the events of the samples that the model was trained on."""
    if loaded.trained_on is None:
        return source.item_counts.astype(np.int64)
    try:
        trained = InferenceSource(loaded.config, loaded.trained_on, loaded.mesh)
    except DataError as error:
        raise DataError(
            f"the popularity of items is that in the data which the model was trained on. {error}"
        ) from error
    store, item = trained.store, trained.roles.item
    counts = np.append(trained.item_counts, 0).astype(np.int64)  # an unknown item has no events
    return counts[stored_vocabulary(store, item).places(source.store.raw_ids(source.roles.item).tolist()).numpy()]

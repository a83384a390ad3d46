"""Data sources for applying a trained model: to newer data than its training data, or without data."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import torch

from hstu.base.errors import DataError
from hstu.base.ids import codes_of
from hstu.checkpoint.dynamic import read_tables
from hstu.checkpoint.raw_ids import RawIds
from hstu.checkpoint.state import TrainState
from hstu.checkpoint.tensors import AVERAGE, TABLES, StoredTensors, join_name, read_metadata
from hstu.config.args import DynamicEmbeddingArgs, EmbeddingArgs
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import ItemFeatures, is_of_negatives
from hstu.data.features.roles import FeatureRoles
from hstu.data.sampling.splits import Period
from hstu.data.store.layout import NumberStatistics
from hstu.data.store.sequence_store import USER_FEATURE
from hstu.model.embedding import TableSpec
from hstu.parallel.mesh import Mesh
from hstu.parallel.shards import ShardedView
from hstu.train.batch_source import BatchSource
from hstu.train.sources import StoreSource
from hstu.train.tables import choose_tables, with_room

log = logging.getLogger(__name__)

_LISTS = ("contextual", "side", "lists", "known_after", "numbers", "number_widths", "tower")
"""Fields of FeatureRoles that checkpoints store under the same names."""


class InferenceSource(StoreSource):
    """Data that may be newer than the model. Tables have a row for each id, and one for unknown ids."""

    has_spare_rows = True
    number_statistics: Mapping[str, NumberStatistics] = MappingProxyType({})
    """The checkpoint has the statistics of the training data."""

    def new_to(self, checkpoint: Path, since: int | None) -> dict[str, np.ndarray]:
        """The ``newcomers`` of a period: users and items that the checkpoint has no row for.

        Also those without an event before ``since``, in seconds since 1970, if the data contains what the checkpoint
        was trained on, or if the checkpoint stores no such ids.
        """
        trained_on = read_metadata(checkpoint).get("trained_on", {})
        goes_on = trained_on == self.trained_on or trained_on.get("state") in self.store.lineage
        found, nothing = {}, np.zeros(0, dtype=np.int64)
        for name, feature in (("new_users", USER_FEATURE), ("new_items", self.roles.item)):
            without_row = self._without_row(feature, checkpoint)
            is_by_time = since is not None and (goes_on or without_row is None)
            unseen = self._unseen(feature, Period(until=since)) if is_by_time else nothing
            found[name] = np.union1d(nothing if without_row is None else without_row, unseen)
        return found

    def _without_row(self, feature: str, checkpoint: Path) -> np.ndarray | None:
        """Model ids, or rows of users, that a checkpoint has no row for; int64 [n]. None: it stores no ids of them."""
        if feature == USER_FEATURE and self.eval_store is not self.store:
            return None
        if (stored := RawIds.from_stored(StoredTensors(checkpoint), [feature]).decoded(feature)) is not None:
            return np.flatnonzero(codes_of(self.store.raw_ids(feature), stored) < 0)
        if feature not in self.raw_features:
            return None
        table = next(name for name, each in read_metadata(checkpoint)["tables"].items() if feature in each["features"])
        stored = np.concatenate([part.ids for part in read_tables(checkpoint)[table]])
        return np.setdiff1d(self.store.raw_ids(feature), stored)

    def _unseen(self, feature: str, period: Period) -> np.ndarray:
        """Model ids, or rows of users, without an event in a period of ``eval_store``, int64 [n]."""
        store = self.eval_store
        if feature == USER_FEATURE:
            begin, stop = period.held_out(store)
            return np.flatnonzero(begin == stop)
        is_known = np.zeros(store.cardinality(feature), dtype=bool)
        is_known[store.sequence(feature)[period.is_within(store.sequence(str(store.timestamp_feature)))]] = True
        codes = np.flatnonzero(~is_known)
        return self._recoding[feature][codes] if feature in self._recoding else store.model_ids(feature, codes)


class StoredSource(BatchSource):
    """Facts from a checkpoint or export about its data, without batches. Raises ``missing`` if something needs data."""

    def __init__(self, config: RunConfig, checkpoint: Path, mesh: Mesh, missing: DataError) -> None:
        super().__init__(config, mesh, 1)
        metadata = read_metadata(checkpoint)
        facts = metadata["features"]
        self.missing = missing
        lists = {name: tuple(facts[name]) for name in _LISTS}
        self.roles = FeatureRoles(facts["item"], facts["action"], **lists)
        self.cardinalities = facts["cardinalities"]
        self.raw_features = tuple(facts["raw"])
        self.ranges = facts.get("ranges", {})
        self.raw_ids = RawIds.from_stored(StoredTensors(checkpoint), self.roles.names)
        dynamic = read_tables(checkpoint)
        tables = [
            (DynamicEmbeddingArgs if name in dynamic else EmbeddingArgs)(
                feature_names=entry["features"],
                table_name=name,
                item_vocab_size_or_capacity=max(1, entry["rows"]),
                sharding_type="model_parallel",
            )
            for name, entry in metadata["tables"].items()
        ]
        self.tables = with_room(choose_tables(config.embeddings, tables, self.roles.names), self.cardinalities)

    def tower_features(self, ids: np.ndarray) -> ItemFeatures | None:
        """See BatchSource."""
        return self._no_data() if self.roles.tower else None

    def _no_data(self, *_: Any, **__: Any) -> NoReturn:
        raise self.missing

    least_action = property(_no_data)
    train_sampler = batch_of = train_batches = eval_batches = _no_data


def describe_features(source: BatchSource) -> dict[str, Any]:
    """The facts in a checkpoint from which a StoredSource is built; JSON."""
    return {
        "item": source.roles.item,
        "action": source.roles.action,
        **{name: list(getattr(source.roles, name)) for name in _LISTS},
        "cardinalities": source.cardinalities,
        "raw": list(source.raw_features),
        "ranges": dict(source.ranges),
    }


def zero_spare_rows(state: TrainState, source: BatchSource) -> None:
    """Zero the rows of static tables that belong to no id. Unknown ids use them."""
    for spec in state.model.specs:
        if spec.dynamic is None:
            first = max(source.cardinalities[name] for name in spec.features if not is_of_negatives(name))
            _zero_rows(state, spec, np.arange(spec.rows) >= first)


def zero_untrained_items(state: TrainState, source: BatchSource) -> None:
    """Zero the rows of items in no training sample, so that an item tower represents them by their features alone."""
    spec = next(spec for spec in state.model.specs if source.roles.item in spec.features)
    if spec.dynamic is None and isinstance(source, StoreSource):  # dynamic tables have no rows for such items
        occurs = source.item_counts > 0
        log.info("item tower: %s of %s items occur in no training sample", f"{(~occurs).sum():,}", f"{len(occurs):,}")
        _zero_rows(state, spec, np.pad(~occurs, (0, spec.rows - len(occurs))))


def _zero_rows(state: TrainState, spec: TableSpec, chosen: np.ndarray) -> None:
    """Zero the chosen rows, bool [rows], of a static table and of its moving average."""
    tensors = state.tensors()
    for name in (f"{TABLES}{spec.name}", join_name(f"{TABLES}{spec.name}", AVERAGE)):
        if name in tensors:
            for start, piece in ShardedView.whole(tensors[name]).shards.items():
                piece[torch.from_numpy(chosen[start[0] : start[0] + len(piece)])] = 0

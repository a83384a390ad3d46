"""The data side of a model that is applied: newer data than it was trained on, histories given by hand, or no data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from hstu.checkpoint.dynamic import read_tables
from hstu.checkpoint.raw_ids import RawIds
from hstu.checkpoint.state import TrainState
from hstu.checkpoint.tensors import AVERAGE, TABLES, join_name, open_tensors, read_metadata
from hstu.config.args import DatasetArgs, DynamicEmbeddingArgs, EmbeddingArgs
from hstu.config.errors import DataError
from hstu.config.run_config import RunConfig
from hstu.data.batch import NEGATIVES, PADDING_ID, HSTUBatch
from hstu.data.collate import Assembler, Rows
from hstu.data.roles import FeatureRoles
from hstu.data.sampler import START, BatchPlan, SamplerPosition, TrainSampler
from hstu.data.samples import Split
from hstu.data.store import USER_FEATURE
from hstu.parallel.mesh import Mesh
from hstu.parallel.shards import ShardedView
from hstu.train.sources import BatchSource, StoreSource
from hstu.train.tables import choose_tables

# --- sources -------------------------------------------------------------------------------------------------------


class InferenceSource(StoreSource):
    """Data that may be newer than the model. Tables have a row for each of its ids, and one for unknown ids."""

    def fit(self, tables: tuple[EmbeddingArgs, ...]) -> tuple[EmbeddingArgs, ...]:
        """See StoreSource."""
        return with_room(tables, self.cardinalities)


class StoredSource(BatchSource):
    """What a checkpoint or an export says about its data, for use without that data. It has no batches.

    Args:
        missing: why there is no data; raised if something needs it.
    """

    def __init__(self, config: RunConfig, checkpoint: Path, mesh: Mesh, missing: DataError) -> None:
        super().__init__(config, mesh, 1)
        assert isinstance(config.dataset, DatasetArgs)
        metadata = read_metadata(checkpoint)
        facts = metadata.get("features")
        if facts is None:  # an earlier version wrote it
            raise missing
        self.missing = missing
        self.roles = FeatureRoles(
            facts["item"],
            facts["action"],
            tuple(facts["contextual"]),
            *(tuple(facts.get(name, ())) for name in ("side", "lists", "known_after")),  # earlier versions lack them
        )
        self.cardinalities = facts["cardinalities"]
        self.raw_features = tuple(facts["raw"])
        self.raw_ids = RawIds.from_stored(open_tensors(checkpoint), self.roles.names)
        dynamic = read_tables(checkpoint)
        stored = [
            DynamicEmbeddingArgs(feature_names=entry["features"], table_name=name, item_vocab_size_or_capacity=rows)
            if name in dynamic
            else EmbeddingArgs(
                feature_names=entry["features"],
                table_name=name,
                item_vocab_size_or_capacity=rows,
                sharding_type="model_parallel",
            )
            for name, entry in metadata["tables"].items()
            for rows in [max(1, entry["rows"])]
        ]
        self.tables = with_room(choose_tables(config.embeddings, stored, self.roles.names), self.cardinalities)
        self.max_items = config.dataset.max_sequence_length

    def _no_data(self) -> NoReturn:
        raise self.missing

    @property
    def least_action(self) -> int:
        """See BatchSource."""
        self._no_data()

    def train_sampler(self, position: SamplerPosition) -> TrainSampler:
        """See BatchSource."""
        self._no_data()

    def train_batches(self, position: SamplerPosition) -> Iterator[HSTUBatch]:
        """See BatchSource."""
        self._no_data()

    def eval_batches(self, split: Split) -> Iterator[HSTUBatch]:
        """See BatchSource."""
        self._no_data()


def describe_features(source: BatchSource) -> dict[str, Any]:
    """The facts in a checkpoint from which a StoredSource is made; JSON."""
    return {
        "item": source.roles.item,
        "action": source.roles.action,
        "contextual": list(source.roles.contextual),
        "side": list(source.roles.side),
        "lists": list(source.roles.lists),
        "known_after": list(source.roles.known_after),
        "cardinalities": source.cardinalities,
        "raw": list(source.raw_features),
    }


def with_room(tables: Sequence[EmbeddingArgs], cardinalities: Mapping[str, int]) -> tuple[EmbeddingArgs, ...]:
    """The tables, the static ones with a row for each id of their features and at least one more."""

    def rows(table: EmbeddingArgs) -> int:
        ids = max(cardinalities[name] for name in table.feature_names)
        return max(table.item_vocab_size_or_capacity, ids + 1)

    return tuple(
        table if isinstance(table, DynamicEmbeddingArgs) else replace(table, item_vocab_size_or_capacity=rows(table))
        for table in tables
    )


def zero_spare_rows(state: TrainState, source: BatchSource) -> None:
    """Zero the rows of static tables that belong to no id; they serve unknown ids."""
    tensors = state.tensors()
    for spec in state.model.specs:
        if spec.dynamic is not None:
            continue
        first = max(source.cardinalities[name] for name in spec.features if name != NEGATIVES)
        for name in (f"{TABLES}{spec.name}", join_name(f"{TABLES}{spec.name}", AVERAGE)):
            if name in tensors:
                tensor = tensors[name]
                view = tensor if isinstance(tensor, ShardedView) else ShardedView.whole(tensor)
                for start, piece in view.shards.items():
                    piece[max(0, first - start[0]) :].zero_()


# --- histories given by hand ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class History:
    """The events of one user, oldest first, in the ids of the raw data."""

    user: Any
    items: np.ndarray | Sequence[Any]
    """[n]: int64 or strings."""
    actions: np.ndarray | Sequence[Any] | None = None
    """int32 [n]; None: the data has no actions."""
    timestamps: np.ndarray | Sequence[int] | None = None
    """int64 [n], seconds since 1970; None: the data has no times."""
    context: dict[str, Any] = field(default_factory=dict)
    """Contextual feature → raw value of this user."""


@dataclass(frozen=True)
class Vocabulary:
    """The ids of one feature, in raw data and as a model gets them."""

    num_ids: int
    raw_ids: np.ndarray | None
    """Code → raw id, ascending: int64 or str objects. None: raw ids are the codes or, with ``keeps_raw``, any int64."""
    keeps_raw: bool

    @property
    def unknown(self) -> int:
        """What the model gets for an unknown id. Its row is zeros."""
        return PADDING_ID if self.keeps_raw else self.num_ids

    def encode(self, values: Iterable[Any]) -> np.ndarray:
        """What the model gets for raw values, int64 [n]; numbers may be given as strings."""
        if self.raw_ids is not None and self.raw_ids.dtype == object:
            wanted = np.array([str(value) for value in values], dtype=object)
            is_number = np.ones(len(wanted), dtype=bool)
        else:
            numbers = [_as_int64(value) for value in values]
            is_number = np.array([number is not None for number in numbers], dtype=bool)
            wanted = np.array([number or 0 for number in numbers], dtype=np.int64)
        if self.keeps_raw:
            return np.where(is_number, wanted, self.unknown)
        if self.raw_ids is None:
            codes, known = wanted, is_number & (wanted >= 0) & (wanted < self.num_ids)
        else:
            codes = np.minimum(np.searchsorted(self.raw_ids, wanted), len(self.raw_ids) - 1)
            known = is_number & (self.raw_ids[codes] == wanted)
        return np.where(known, codes, self.unknown).astype(np.int64)

    def decode(self, ids: np.ndarray) -> list[Any]:
        """Raw ids of what the model gets, which must be known."""
        decoded: list[Any] = (ids if self.raw_ids is None or self.keeps_raw else self.raw_ids[ids]).tolist()
        return decoded


def _as_int64(value: Any) -> int | None:
    try:
        number = int(str(value))
    except ValueError:
        return None
    return number if -(2**63) <= number < 2**63 else None


def vocabularies_of(source: BatchSource, raw_ids: RawIds) -> dict[str, Vocabulary]:
    """The vocabulary of each feature."""
    return {
        name: Vocabulary(source.cardinalities[name], raw_ids.decoded(name), name in source.raw_features)
        for name in source.roles.names
    }


class HistoryEncoder:
    """Turns histories given by hand into batches of the model of ``config``."""

    def __init__(self, config: RunConfig, source: BatchSource, vocabularies: Mapping[str, Vocabulary]) -> None:
        self._config, self._source, self._vocabularies = config, source, vocabularies
        self.unknown: dict[str, set[Any]] = defaultdict(set)
        """Feature → raw values that the model does not have, of all histories so far."""

    def encode(self, feature: str, values: Sequence[Any]) -> np.ndarray:
        """What the model gets for raw values, int64 [n]. Notes those that are unknown."""
        vocabulary = self._vocabularies[feature]
        ids = vocabulary.encode(values)
        self.unknown[feature] |= {value for value, id_ in zip(values, ids, strict=True) if id_ == vocabulary.unknown}
        return ids

    def batches(self, histories: Sequence[History]) -> Iterator[HSTUBatch]:
        """The histories in order, each cut to its newest items. Raises DataError for one that lacks something."""
        source, size = self._source, self._config.trainer.eval_batch_size
        # An evaluation batch, so that no negatives are drawn; its held-out items mean nothing.
        assembler = Assembler(size, "retrieval", source.roles, 1, seed=0, negatives=source.negatives)
        for first in range(0, len(histories), size):
            chunk = histories[first : first + size]
            count = np.arange(len(chunk))
            yield assembler.assemble(self._rows(chunk), BatchPlan(count, count, 0, 0, START))

    def _rows(self, histories: Sequence[History]) -> Rows:
        roles, cut = self._source.roles, slice(-self._source.max_items, None)
        for history in histories:
            self._check(history)
        lengths = np.array([len(history.items[cut]) for history in histories], dtype=np.int64)
        nothing = np.zeros_like(lengths)
        values: dict[str, list[Any]] = {
            "items": [value for history in histories for value in history.items[cut]],
            "actions": [value for history in histories for value in _given(history.actions)[cut]],
            "times": [value for history in histories for value in _given(history.timestamps)[cut]],
        }
        needs_times = self._config.network.has_relative_bias
        return Rows(
            user_ids=np.arange(len(histories)),
            lengths=lengths,
            num_candidates=nothing,
            num_labels=nothing,
            items=self.encode(roles.item, values["items"]),
            actions=self.encode(roles.action, values["actions"]) if roles.action else None,
            timestamps=np.array(values["times"], dtype=np.int64) if needs_times else None,
            context={
                name: np.concatenate([self._context(name, each) for each in histories]) for name in roles.contextual
            },
            held_out=nothing,
        )

    def _context(self, feature: str, history: History) -> np.ndarray:
        """The value of one feature, int64 [1]. One that is not given is unknown, too, but not noted."""
        value = history.context.get(feature, history.user if feature == USER_FEATURE else None)
        return np.array([self._vocabularies[feature].unknown]) if value is None else self.encode(feature, [value])

    def _check(self, history: History) -> None:
        roles, items = self._source.roles, len(history.items)
        of_user = f"the history of {history.user!r}"
        if not items:
            raise DataError(f"{of_user} has no items; give at least one")
        if roles.side:
            raise DataError(
                f"{of_user} has items alone, and the model also reads {', '.join(roles.side)} of each, which cannot be "
                "given by hand; preprocess the data of these users, and name the users instead"
            )
        needed = {
            "actions": (history.actions, roles.action and f"the model reads {roles.action!r}"),
            "timestamps": (history.timestamps, self._config.network.has_relative_bias and "the model reads times"),
        }
        for name, (given, reason) in needed.items():
            if reason and given is None:
                raise DataError(f"{of_user} has no {name}, but {reason}: give one per item")
            if given is not None and len(given) != items:
                raise DataError(f"{of_user} has {len(given)} {name} for {items} items; give one per item")
        if unknown := [name for name in history.context if name not in roles.contextual]:
            raise DataError(
                f"{of_user}: the model has no contextual feature {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(roles.contextual) or 'none'}"
            )


def _given(values: Sequence[Any] | np.ndarray | None) -> Sequence[Any] | np.ndarray:
    return () if values is None else values

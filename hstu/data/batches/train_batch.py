"""TrainBatch: the sequences that a rank looks up in the tables, and the batches that its dense part computes on.

Under tensor and context parallelism each rank of a group computes on the sequences of all its ranks (merge_ranks).
With gradient accumulation the dense part computes one micro-batch after another (split_micro_batches). The batch as a
whole has one look-up and one update of the tables, and what a loss needs of all samples: its count of labels and its
pool of negatives. So the update equals an undivided batch, with the activations of one micro-batch in memory.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu.data.batches.batch import (
    NEGATIVES,
    Group,
    HSTUBatch,
    TensorGroup,
    is_of_negatives,
    keyed_jagged,
    labels_with_history,
)
from hstu.data.batches.jagged import ranges, run_offsets
from hstu.data.features.roles import FeatureRoles


@dataclass(frozen=True)
class GroupLayout:
    """Which elements of the merged batch of a tp_cp group belong to which rank."""

    num_values: dict[str, list[int]]
    """Per key, the number of values of each rank. Shared negatives are left out: they are equal on all ranks, and each
    rank looks them up itself."""
    sequences: slice
    """This rank's real sequences in the merged batch."""
    labels: slice
    """This rank's labelled items in the merged batch."""


@dataclass(kw_only=True)
class TrainBatch(TensorGroup):
    """One training step of one rank."""

    own: HSTUBatch
    """The sequences of this rank. Their features are looked up in the sharded tables."""
    parts: tuple[HSTUBatch, ...]
    """Batches of the dense part, in order: ``own``, the merged batch of the group, or micro-batches of either."""
    group: GroupLayout | None = None
    """How the looked-up rows of the group's ranks are merged. None without a group."""
    pool_positions: Tensor | None = None
    """int64 [S]: BatchNegatives.pool_positions of the undivided batch, for in-batch negatives in micro-batches."""
    pool_feature_positions: KeyedJaggedTensor | None = None
    """With an item tower: feature → positions of the values of the pool's S items in the values of the batch."""

    @classmethod
    def of(
        cls, own: HSTUBatch, computed: HSTUBatch, group: GroupLayout | None, count: int, roles: FeatureRoles
    ) -> Self:
        """Splits ``computed``, which is ``own`` or the merged batch of its group, into ``count`` micro-batches."""
        if count == 1:
            return cls(own=own, parts=(computed,), group=group)
        return cls(
            own=own,
            parts=split_micro_batches(computed, count, roles),
            group=group,
            pool_positions=computed.negatives.pool_positions,
            pool_feature_positions=_pool_feature_positions(computed, roles),
        )

    @property
    def features(self) -> KeyedJaggedTensor:
        """The ids that TorchRec's pipelines exchange ahead of the step."""
        return self.own.features

    def record_stream(self, stream: torch.Stream) -> None:
        """See TensorGroup."""
        super().record_stream(stream)
        for part in self.parts:
            part.record_stream(stream)

    def _map(self, function: Callable[[Any], Any], *also: type) -> Self:
        mapped = super()._map(function, *also)
        parts = tuple(mapped.own if part is self.own else function(part) for part in self.parts)
        return dataclasses.replace(mapped, parts=parts)


def merge_ranks(batches: Sequence[HSTUBatch], rank: int, item_feature: str) -> tuple[HSTUBatch, GroupLayout]:
    """Merges the batches of a tp_cp group, given in rank order and on the host. Returns the merged batch, with real
    sequences in rank order before all padding, and its layout for ``rank``."""
    real = [batch.real_batch_size for batch in batches]
    features = [batch.features.to_dict() for batch in batches]
    by_rank = {key: [keyed[key].values().numpy() for keyed in features] for key in features[0]}
    shared = {key for key in by_rank if is_of_negatives(key) and batches[0].negatives.draws is None}
    values, lengths = {}, {}
    for key, arrays in by_rank.items():
        values[key] = arrays[0] if key in shared else np.concatenate(arrays)
        of_ranks = list(zip([keyed[key].lengths().numpy() for keyed in features], real, strict=True))
        lengths[key] = np.concatenate([*(array[:n] for array, n in of_ranks), *(array[n:] for array, n in of_ranks)])
        if is_of_negatives(key):
            lengths[key] = _all_in_first(len(lengths[key]), len(values[key]))
    parts = [_cut(each, _bounds(each, slice(each.real_batch_size), slice(None))) for each in batches]
    padding = [_cut(each, _bounds(each, slice(each.real_batch_size, None), slice(0))) for each in batches]
    merged = _joined(parts + padding)
    has_pool = batches[0].negatives.pool_positions is not None
    negatives = dataclasses.replace(
        merged.negatives,
        draws=_merged_draws(batches, by_rank.get(NEGATIVES)),
        pool_positions=torch.from_numpy(np.unique(values[item_feature], return_index=True)[1]) if has_pool else None,
        list_lengths=_concatenated([each.negatives.list_lengths for each in batches[: 1 if shared else None]], dim=1),
    )
    merged = dataclasses.replace(
        merged, features=keyed_jagged(values, lengths), negatives=negatives, real_batch_size=sum(real)
    )
    layout = GroupLayout(
        num_values={key: [len(array) for array in arrays] for key, arrays in by_rank.items() if key not in shared},
        sequences=slice(*_offsets(real)[rank : rank + 2]),
        labels=slice(*_offsets([batch.num_labels_total for batch in batches])[rank : rank + 2]),
    )
    return merged, layout


def _bounds(batch: HSTUBatch, sequences: slice, others: slice) -> dict[str, slice]:
    """Axis of fields → slice to cut. In retrieval evaluation, each sequence has one label."""
    is_per_label = len(batch.labels) == batch.num_labels_total
    axes = {"item": others, "draw": others, "seen": others}
    return axes | {"sequence": sequences, "label": others if is_per_label else sequences}


def _cut(group: Group, bounds: Mapping[str, slice]) -> Group:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if isinstance(value, TensorGroup):
            changes[field.name] = _cut(value, bounds)
        elif value is not None and "axis" in field.metadata:
            chosen = bounds[field.metadata["axis"]]
            changes[field.name] = value[chosen] if field.metadata["dim"] == 0 else value[:, chosen]
    return dataclasses.replace(group, **changes)


def _joined(groups: Sequence[Group]) -> Group:
    """Concatenates each field that has an axis. Other fields come from the first group."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(groups[0]):
        values = [getattr(group, field.name) for group in groups]
        if isinstance(values[0], TensorGroup):
            changes[field.name] = _joined(values)
        elif isinstance(values[0], np.ndarray):
            changes[field.name] = np.concatenate(values)
        elif "axis" in field.metadata:
            changes[field.name] = _concatenated(values, field.metadata["dim"])
    return dataclasses.replace(groups[0], **changes)


def _concatenated(tensors: Sequence[Tensor | None], dim: int = 0) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present, dim) if present else None


def _merged_draws(batches: Sequence[HSTUBatch], negatives: Sequence[np.ndarray] | None) -> Tensor | None:
    """Shifts indices into the NEGATIVES by the number of NEGATIVES of earlier ranks. Raw random numbers stay."""
    counts = [0] * len(batches) if negatives is None else [len(of_rank) for of_rank in negatives]
    draws = [batch.negatives.draws for batch in batches]
    shifts = _offsets(counts)
    return _concatenated([None if draw is None else draw + shift for draw, shift in zip(draws, shifts, strict=False)])


def _pool_feature_positions(batch: HSTUBatch, roles: FeatureRoles) -> KeyedJaggedTensor | None:
    """See TrainBatch.pool_feature_positions. None without an item tower or without a pool."""
    if batch.negatives.pool_positions is None or not roles.tower:
        return None
    items, positions, lengths = batch.negatives.pool_positions.numpy(), {}, {}
    for name in roles.tower:
        positions[name], lengths[name] = items, np.ones_like(items)
        if name in roles.lists:
            assert batch.items.list_lengths is not None
            of_items = batch.items.list_lengths[roles.lists.index(name)].numpy()
            lengths[name] = of_items[items]
            positions[name] = ranges(run_offsets(of_items)[items], lengths[name])
    return keyed_jagged(positions, lengths)


def split_micro_batches(batch: HSTUBatch, count: int, roles: FeatureRoles) -> tuple[HSTUBatch, ...]:
    """Splits a training batch on the host into ``count`` runs of equally many sequences. Some may be all padding.
    NEGATIVES and the pool of in-batch negatives belong to the whole batch, so every part has all of them."""
    features = batch.features.to_dict()
    values = {key: jagged.values().numpy() for key, jagged in features.items()}
    lengths = {key: jagged.lengths().numpy() for key, jagged in features.items()}
    pool_ids, pool_features = None, None
    if batch.negatives.pool_positions is not None:
        pool_ids = torch.from_numpy(values[roles.item][batch.negatives.pool_positions.numpy()])
    if (positions := _pool_feature_positions(batch, roles)) is not None:
        of_pool = positions.to_dict()
        pool_features = keyed_jagged(
            {name: values[name][found.values().numpy()] for name, found in of_pool.items()},
            {name: found.lengths().numpy() for name, found in of_pool.items()},
        )
    negatives = dataclasses.replace(
        batch.negatives, pool_positions=None, pool_ids=pool_ids, pool_features=pool_features
    )
    whole = dataclasses.replace(batch, negatives=negatives, position=None)
    offsets = {key: _offsets(lengths[key]) for key in values}
    of_axes = {
        "sequence": [*range(batch.batch_size + 1)],
        "item": offsets[roles.item],
        "label": _offsets(batch.num_labels_host),
        "draw": _offsets(labels_with_history(batch.num_labels_host, batch.item_lengths)),
        "seen": [] if batch.seen is None else _offsets(batch.seen.lengths.numpy()),
    }

    def part(start: int, stop: int) -> HSTUBatch:
        part_values, part_lengths = dict(values), {key: lengths[key][start:stop] for key in values}
        for key in values:
            if is_of_negatives(key):
                part_lengths[key] = _all_in_first(stop - start, len(values[key]))
            else:
                part_values[key] = values[key][offsets[key][start] : offsets[key][stop]]
        cut = _cut(whole, {axis: slice(ends[start], ends[stop]) for axis, ends in of_axes.items() if ends})
        real = min(max(batch.real_batch_size - start, 0), stop - start)
        return dataclasses.replace(cut, features=keyed_jagged(part_values, part_lengths), real_batch_size=real)

    size = batch.batch_size // count
    return tuple(part(start, stop) for start, stop in pairwise(range(0, count * size + 1, size)))


def _offsets(lengths: Sequence[int] | np.ndarray) -> list[int]:
    return run_offsets(lengths).tolist()


def _all_in_first(size: int, total: int) -> np.ndarray:
    """Lengths int64 [size] of a feature whose ``total`` values all belong to the first sequence."""
    lengths = np.zeros(size, dtype=np.int64)
    lengths[0] = total
    return lengths

"""TrainBatch: the sequences that a rank looks up, and the batches that its dense part computes from them.

The two differ in two cases, which combine:

- Under tensor and context parallelism the ranks of a group compute on the sequences of all of them: ``merge_ranks``.
- With gradient accumulation the dense part computes one micro-batch after another: ``split_micro_batches``. The tables
  see the batch as a whole, with one look-up and one update. What a loss needs of all samples (its count of labels, its
  pool of negatives) also belongs to the whole batch, so the update is that of the undivided batch, with the
  activations of one micro-batch in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu.data.batches.batch import (
    NEGATIVES,
    BatchNegatives,
    HSTUBatch,
    ItemColumns,
    SeenIds,
    TensorGroup,
    is_of_negatives,
    keyed_jagged,
    labels_with_history,
)
from hstu.data.batches.jagged import ranges, run_offsets
from hstu.data.features.roles import FeatureRoles


@dataclass(frozen=True)
class GroupLayout:
    """Which part of the merged batch of a tp_cp group belongs to which rank."""

    num_values: dict[str, list[int]]
    """Per key, the number of values that each rank contributes. Shared negatives, which are equal on all ranks and
    which each rank looks up itself, are left out."""
    sequences: slice
    """This rank's real sequences in the merged batch."""
    labels: slice
    """This rank's labelled items among those of the merged batch."""


@dataclass(kw_only=True)
class TrainBatch(TensorGroup):
    """One training step of one rank."""

    own: HSTUBatch
    """The sequences of this rank. Their features are looked up in the sharded tables."""
    parts: tuple[HSTUBatch, ...]
    """What the dense part computes on, in order: ``own``, the merged batch of the group, or micro-batches of either."""
    group: GroupLayout | None = None
    """How the looked-up rows of the group's ranks are merged. None for a rank by itself."""
    pool_positions: Tensor | None = None
    """int64 [S]. In-batch negatives in micro-batches: see BatchNegatives.pool_positions, for the undivided batch."""
    pool_feature_positions: KeyedJaggedTensor | None = None
    """With an item tower: feature → positions of the values of the pool's S items among the values of the batch."""

    @property
    def features(self) -> KeyedJaggedTensor:
        """The ids that TorchRec's pipelines exchange ahead of the step."""
        return self.own.features

    def record_stream(self, stream: torch.Stream) -> None:
        """See TensorGroup."""
        super().record_stream(stream)
        for part in self.parts:
            part.record_stream(stream)

    def _map(self, function: Callable[[Any], Any]) -> Self:
        mapped = super()._map(function)
        parts = tuple(mapped.own if part is self.own else function(part) for part in self.parts)
        return dataclasses.replace(mapped, parts=parts)


def merge_ranks(batches: Sequence[HSTUBatch], rank: int, item_feature: str) -> tuple[HSTUBatch, GroupLayout]:
    """Merge the batches of a tp_cp group, given in rank order and on the host.

    Returns (the real sequences rank after rank and then the padding, the layout seen from ``rank``). What only
    evaluators read of a rank's own batch (position) is left out.
    """
    features = [batch.features.to_dict() for batch in batches]
    by_rank = {key: [keyed[key].values().numpy() for keyed in features] for key in features[0]}
    shared = {key for key in by_rank if is_of_negatives(key) and batches[0].negatives.draws is None}
    values, lengths = {}, {}
    for key, arrays in by_rank.items():
        values[key] = arrays[0] if key in shared else np.concatenate(arrays)
        lengths[key] = _stack(batches, [keyed[key].lengths().numpy() for keyed in features])
        if is_of_negatives(key):
            lengths[key] = _all_in_first(len(lengths[key]), len(values[key]))
    labels = [batch.labels.numpy() for batch in batches]
    is_per_label = all(len(batch.labels) == batch.num_labels_total for batch in batches)
    num_candidates = _stack(batches, [batch.num_candidates_host for batch in batches])
    num_labels = _stack(batches, [batch.num_labels.numpy() for batch in batches])
    has_pool = batches[0].negatives.pool_positions is not None
    merged = HSTUBatch(
        features=keyed_jagged(values, lengths),
        num_candidates=torch.from_numpy(num_candidates),
        num_labels=torch.from_numpy(num_labels),
        labels=torch.from_numpy(np.concatenate(labels) if is_per_label else _stack(batches, labels)),
        user_ids=torch.from_numpy(_stack(batches, [batch.user_ids.numpy() for batch in batches])),
        label_values=_concatenate([batch.label_values for batch in batches], dim=1),
        request_times=_stack_tensors(batches, [batch.request_times for batch in batches]),
        items=ItemColumns(
            timestamps=_concatenate([batch.items.timestamps for batch in batches]),
            numbers=_concatenate([batch.items.numbers for batch in batches]),
            list_lengths=_concatenate([batch.items.list_lengths for batch in batches], dim=1),
        ),
        negatives=BatchNegatives(
            draws=_merge_draws(batches, by_rank.get(NEGATIVES)),
            pool_positions=torch.from_numpy(np.unique(values[item_feature], return_index=True)[1])
            if has_pool
            else None,
            list_lengths=_concatenate(
                [batch.negatives.list_lengths for batch in (batches[:1] if shared else batches)], dim=1
            ),
        ),
        seen=_merge_seen(batches),
        real_batch_size=sum(batch.real_batch_size for batch in batches),
        item_lengths=_stack(batches, [batch.item_lengths for batch in batches]),
        num_candidates_host=num_candidates,
        num_labels_host=num_labels,
    )
    layout = GroupLayout(
        num_values={key: [len(array) for array in arrays] for key, arrays in by_rank.items() if key not in shared},
        sequences=_range_of_rank([batch.real_batch_size for batch in batches], rank),
        labels=_range_of_rank([batch.num_labels_total for batch in batches], rank),
    )
    return merged, layout


def _stack(batches: Sequence[HSTUBatch], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Merge arrays with one element per sequence: the real sequences rank after rank, then the padding."""
    real = [batch.real_batch_size for batch in batches]
    return np.concatenate(
        [array[:count] for array, count in zip(arrays, real, strict=True)]
        + [array[count:] for array, count in zip(arrays, real, strict=True)]
    )


def _stack_tensors(batches: Sequence[HSTUBatch], tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor.numpy() for tensor in tensors if tensor is not None]
    return torch.from_numpy(_stack(batches, present)) if present else None


def _concatenate(tensors: Sequence[Tensor | None], dim: int = 0) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present, dim) if present else None


def _merge_draws(batches: Sequence[HSTUBatch], negatives: Sequence[np.ndarray] | None) -> Tensor | None:
    """Shift indices into the NEGATIVES by the number of those of the ranks before. Raw random numbers stay."""
    shift, draws = 0, []
    for rank, batch in enumerate(batches):
        draws.append(None if batch.negatives.draws is None else batch.negatives.draws + shift)
        shift += 0 if negatives is None else len(negatives[rank])
    return _concatenate(draws)


def _merge_seen(batches: Sequence[HSTUBatch]) -> SeenIds | None:
    seen = [batch.seen for batch in batches if batch.seen is not None]
    if not seen:
        return None
    offsets = run_offsets(_stack(batches, [each.offsets.diff().numpy() for each in seen]))
    return SeenIds(values=torch.cat([each.values for each in seen]), offsets=torch.from_numpy(offsets))


def _range_of_rank(counts: Sequence[int], rank: int) -> slice:
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


def pool_feature_positions(batch: HSTUBatch, roles: FeatureRoles) -> KeyedJaggedTensor | None:
    """See TrainBatch.pool_feature_positions. None without an item tower, or without a pool."""
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
    """Split a training batch on the host into ``count`` runs of equally many sequences. Some may be all padding.

    NEGATIVES and the pool of in-batch negatives belong to the whole batch, so every part has all of them.
    """
    item_feature = roles.item
    features = batch.features.to_dict()
    values = {key: jagged.values().numpy() for key, jagged in features.items()}
    lengths = {key: jagged.lengths().numpy() for key, jagged in features.items()}
    offsets = {key: _offsets(lengths[key]) for key in values if not is_of_negatives(key)}
    num_labels = batch.num_labels.numpy()
    label_offsets = _offsets(num_labels)
    draw_offsets = _offsets(labels_with_history(num_labels, batch.item_lengths))
    pool_ids, pool_features = None, None
    if batch.negatives.pool_positions is not None:
        pool_ids = torch.from_numpy(values[item_feature][batch.negatives.pool_positions.numpy()])
    if (positions := pool_feature_positions(batch, roles)) is not None:
        of_pool = positions.to_dict()
        pool_features = keyed_jagged(
            {name: values[name][found.values().numpy()] for name, found in of_pool.items()},
            {name: found.lengths().numpy() for name, found in of_pool.items()},
        )

    def part(start: int, stop: int) -> HSTUBatch:
        part_values = {key: values[key][offsets[key][start] : offsets[key][stop]] for key in offsets}
        part_lengths = {key: lengths[key][start:stop] for key in offsets}
        for key in (key for key in values if key not in offsets):
            part_values[key], part_lengths[key] = values[key], _all_in_first(stop - start, len(values[key]))
        items = slice(offsets[item_feature][start], offsets[item_feature][stop])
        columns, negatives, seen = batch.items, batch.negatives, batch.seen
        if seen is not None:
            first, end = seen.offsets[start], seen.offsets[stop]
            seen = SeenIds(values=seen.values[first:end], offsets=seen.offsets[start : stop + 1] - first)
        labels = slice(label_offsets[start], label_offsets[stop])
        return HSTUBatch(
            features=keyed_jagged(part_values, part_lengths),
            num_candidates=batch.num_candidates[start:stop],
            num_labels=batch.num_labels[start:stop],
            labels=batch.labels[labels],
            user_ids=batch.user_ids[start:stop],
            label_values=None if batch.label_values is None else batch.label_values[:, labels],
            items=ItemColumns(
                timestamps=None if columns.timestamps is None else columns.timestamps[items],
                numbers=None if columns.numbers is None else columns.numbers[items],
                list_lengths=None if columns.list_lengths is None else columns.list_lengths[:, items],
            ),
            negatives=BatchNegatives(
                draws=None if negatives.draws is None else negatives.draws[draw_offsets[start] : draw_offsets[stop]],
                pool_ids=pool_ids,
                pool_features=pool_features,
                list_lengths=negatives.list_lengths,
            ),
            seen=seen,
            real_batch_size=min(max(batch.real_batch_size - start, 0), stop - start),
            item_lengths=batch.item_lengths[start:stop],
            num_candidates_host=batch.num_candidates_host[start:stop],
            num_labels_host=num_labels[start:stop],
        )

    size = batch.batch_size // count
    return tuple(part(start, stop) for start, stop in pairwise(range(0, count * size + 1, size)))


def _offsets(lengths: np.ndarray) -> list[int]:
    """Start of each of n runs and the end of the last: n + 1 integers."""
    return run_offsets(lengths).tolist()


def _all_in_first(size: int, total: int) -> np.ndarray:
    """Lengths int64 [size] of a feature whose ``total`` values all belong to the first sequence."""
    lengths = np.zeros(size, dtype=np.int64)
    lengths[0] = total
    return lengths

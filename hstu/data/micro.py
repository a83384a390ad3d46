"""A batch cut into micro-batches, which the dense part computes one after the other with their gradients summed.

The tables see the batch as a whole: one look-up, one update. What a loss needs of all samples (its count of labels, its
pool of negatives) is the whole batch's, too, so the update is that of the batch in one piece, with the activations of
one micro-batch in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hstu.data.batch import NEGATIVES, HSTUBatch, MicroBatch, keyed_jagged


def with_micro_batches(batches: Iterator[HSTUBatch], count: int, item_feature: str) -> Iterator[HSTUBatch]:
    """Training batches on the host, each with ``count`` micro-batches (of its group's batch, where it has one)."""
    return batches if count == 1 else (_with_own(batch, count, item_feature) for batch in batches)


def _with_own(batch: HSTUBatch, count: int, item_feature: str) -> HSTUBatch:
    if batch.group is None:
        return dataclasses.replace(batch, micro=_pinned_as(batch, split(batch, count, item_feature)))
    whole = batch.group.batch
    whole = dataclasses.replace(whole, micro=_pinned_as(batch, split(whole, count, item_feature)))
    return dataclasses.replace(batch, group=dataclasses.replace(batch.group, batch=whole))


def _pinned_as(batch: HSTUBatch, parts: tuple[MicroBatch, ...]) -> tuple[MicroBatch, ...]:
    return tuple(part.pin_memory() for part in parts) if batch.labels.is_pinned() else parts


def split(batch: HSTUBatch, count: int, item_feature: str) -> tuple[MicroBatch, ...]:
    """``count`` runs of equally many sequences of a training batch on the host. Some may hold nothing but padding.

    NEGATIVES and the pool of in_batch negatives belong to the whole batch, so every part has all of them.
    """
    features = batch.features.to_dict()
    values = {key: jagged.values().numpy() for key, jagged in features.items()}
    lengths = {key: jagged.lengths().numpy() for key, jagged in features.items()}
    ends = {key: _ends(lengths[key]) for key in values if key != NEGATIVES}
    cuts = np.arange(count + 1) * (batch.batch_size // count)
    label_ends = _ends(batch.num_labels.numpy())
    pool_ids = None
    if batch.pool_positions is not None:
        pool_ids = torch.from_numpy(values[item_feature][batch.pool_positions.numpy()])

    def part(start: int, stop: int) -> MicroBatch:
        rows = {key: slice(int(ends[key][start]), int(ends[key][stop])) for key in ends}
        part_values = {key: values[key][rows[key]] for key in ends}
        part_lengths = {key: lengths[key][start:stop] for key in ends}
        if NEGATIVES in values:
            rows[NEGATIVES] = slice(0, len(values[NEGATIVES]))
            part_values[NEGATIVES] = values[NEGATIVES]
            part_lengths[NEGATIVES] = np.zeros(stop - start, dtype=np.int64)
            part_lengths[NEGATIVES][0] = len(values[NEGATIVES])
        labels = slice(int(label_ends[start]), int(label_ends[stop]))
        return MicroBatch(
            batch=HSTUBatch(
                features=keyed_jagged(part_values, part_lengths),
                num_candidates=batch.num_candidates[start:stop],
                num_labels=batch.num_labels[start:stop],
                labels=batch.labels[labels],
                user_ids=batch.user_ids[start:stop],
                timestamps=_rows(batch.timestamps, rows[item_feature]),
                draws=_rows(batch.draws, labels),
                pool_ids=pool_ids,
                real_batch_size=min(max(batch.real_batch_size - start, 0), stop - start),
                item_lengths=batch.item_lengths[start:stop],
                num_candidates_host=batch.num_candidates_host[start:stop],
                num_labels_total=labels.stop - labels.start,
            ),
            rows=rows,
        )

    return tuple(part(int(start), int(stop)) for start, stop in pairwise(cuts))


def _ends(lengths: np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each of n runs begins, and where the last ends."""
    return np.concatenate([[0], np.cumsum(lengths)])


def _rows(tensor: Tensor | None, where: slice) -> Tensor | None:
    return None if tensor is None else tensor[where]

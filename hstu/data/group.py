"""The batches of several ranks as the one batch that their tensor-parallel group computes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hstu.data.batch import NEGATIVES, GroupBatch, HSTUBatch, keyed_jagged


@dataclass(frozen=True, kw_only=True)
class HostBatch:
    """What a group needs to know of one rank's batch, as host arrays; fields as in HSTUBatch."""

    values: dict[str, np.ndarray]
    """Feature → int64 ids."""
    lengths: dict[str, np.ndarray]
    """Feature → int64 [B]."""
    num_labels: np.ndarray
    labels: np.ndarray
    user_ids: np.ndarray
    timestamps: np.ndarray | None
    draws: np.ndarray | None
    has_pool: bool
    """Negatives come from the items of the batch."""
    real_batch_size: int
    item_lengths: np.ndarray
    num_candidates: np.ndarray
    num_labels_total: int
    item_feature: str

    @classmethod
    def of(cls, batch: HSTUBatch, item_feature: str) -> HostBatch:
        """From a batch on the host."""
        features = batch.features.to_dict()
        return cls(
            values={key: jagged.values().numpy() for key, jagged in features.items()},
            lengths={key: jagged.lengths().numpy() for key, jagged in features.items()},
            num_labels=batch.num_labels.numpy(),
            labels=batch.labels.numpy(),
            user_ids=batch.user_ids.numpy(),
            timestamps=None if batch.timestamps is None else batch.timestamps.numpy(),
            draws=None if batch.draws is None else batch.draws.numpy(),
            has_pool=batch.pool_positions is not None,
            real_batch_size=batch.real_batch_size,
            item_lengths=batch.item_lengths,
            num_candidates=batch.num_candidates_host,
            num_labels_total=batch.num_labels_total,
            item_feature=item_feature,
        )

    @property
    def shares_negatives(self) -> bool:
        """NEGATIVES are one set for all labels, the same on every rank."""
        return NEGATIVES in self.values and self.draws is None


def merge(parts: Sequence[HostBatch], rank: int) -> GroupBatch:
    """The batches of a group's ranks, in rank order, as the batch of the group, seen from ``rank`` of the group."""
    values, lengths = _features(parts)
    item_lengths = _stack(parts, [part.item_lengths for part in parts])
    num_candidates = _stack(parts, [part.num_candidates for part in parts])
    total = sum(part.num_labels_total for part in parts)
    labels = [part.labels for part in parts]
    is_per_label = all(len(part.labels) == part.num_labels_total for part in parts)
    items = values[parts[0].item_feature]
    batch = HSTUBatch(
        features=keyed_jagged(values, lengths),
        num_candidates=torch.from_numpy(num_candidates),
        num_labels=torch.from_numpy(_stack(parts, [part.num_labels for part in parts])),
        labels=torch.from_numpy(np.concatenate(labels) if is_per_label else _stack(parts, labels)),
        user_ids=torch.from_numpy(_stack(parts, [part.user_ids for part in parts])),
        timestamps=_joined([part.timestamps for part in parts]),
        draws=_draws(parts),
        pool_positions=torch.from_numpy(np.unique(items, return_index=True)[1]) if parts[0].has_pool else None,
        real_batch_size=sum(part.real_batch_size for part in parts),
        item_lengths=item_lengths,
        num_candidates_host=num_candidates,
        num_labels_total=total,
    )
    return GroupBatch(
        batch=batch,
        num_values={
            key: [len(part.values[key]) for part in parts]
            for key in values
            if not (key == NEGATIVES and parts[0].shares_negatives)
        },
        sequences=_share([part.real_batch_size for part in parts], rank),
        labels=_share([part.num_labels_total for part in parts], rank),
    )


def _features(parts: Sequence[HostBatch]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    values, lengths = {}, {}
    for key in parts[0].values:
        if key == NEGATIVES:
            own = parts[:1] if parts[0].shares_negatives else parts
            values[key] = np.concatenate([part.values[key] for part in own])
            lengths[key] = np.zeros(sum(len(part.lengths[key]) for part in parts), dtype=np.int64)
            lengths[key][0] = len(values[key])  # all in the slot of the first sequence
        else:
            values[key] = np.concatenate([part.values[key] for part in parts])
            lengths[key] = _stack(parts, [part.lengths[key] for part in parts])
    return values, lengths


def _stack(parts: Sequence[HostBatch], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays of one element a sequence: those of the real sequences, rank after rank, then those of the padding."""
    real = [part.real_batch_size for part in parts]
    return np.concatenate(
        [array[:count] for array, count in zip(arrays, real, strict=True)]
        + [array[count:] for array, count in zip(arrays, real, strict=True)]
    )


def _joined(arrays: Sequence[np.ndarray | None]) -> Tensor | None:
    present = [array for array in arrays if array is not None]
    return torch.from_numpy(np.concatenate(present)) if present else None


def _draws(parts: Sequence[HostBatch]) -> Tensor | None:
    """Indices into the NEGATIVES move by those of the ranks before; raw random numbers stay."""
    shift, draws = 0, []
    for part in parts:
        draws.append(part.draws if part.draws is None else part.draws + np.int32(shift))
        shift += len(part.values.get(NEGATIVES, ()))
    return _joined(draws)


def _share(counts: Sequence[int], rank: int) -> slice:
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])

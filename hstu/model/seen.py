"""What users had seen before their targets, among the negatives of a batch (RetrievalArgs.mask_seen).

Shapes depend on shapes only: the host never waits for a size from the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hstu.data.batches.batch import HSTUBatch
from hstu.ops.kernels import NEVER_SEEN, SeenItems
from hstu.ops.pytorch.softmax_loss import first_places

_BEFORE_THE_SEQUENCE = -1


def find_seen(pool_ids: Tensor, targets: Tensor, batch: HSTUBatch, item_feature: str) -> SeenItems:
    """The entries of a pool that each user of a batch has up to each target.

    pool_ids: int64 [S]. targets: int64 [M], indices into the item values of ``batch``.
    """
    ordered = pool_ids.sort().values
    items = batch.features[item_feature]
    sequences = _rows(items.lengths(), len(items.values()))
    places = torch.arange(len(sequences), device=ordered.device) - items.offsets()[:-1][sequences]
    size = len(pool_ids) + 1  # the last column is for items that the pool lacks
    first = torch.full((batch.batch_size, size), NEVER_SEEN, dtype=torch.int32, device=ordered.device)
    flat, columns = first.view(-1), first_places(items.values(), ordered)
    flat.scatter_reduce_(0, sequences * size + columns, places.int(), "amin")
    if batch.seen is not None:
        rows = _rows(batch.seen.offsets.diff(), len(batch.seen.values))
        flat[rows * size + first_places(batch.seen.values, ordered)] = _BEFORE_THE_SEQUENCE
    of_entries = first.index_select(1, torch.searchsorted(ordered, pool_ids))
    return SeenItems(of_entries, sequences[targets].int(), places[targets].int())


def _rows(lengths: Tensor, total: int) -> Tensor:
    """The row of each element: int64 [total]. lengths: int64 [B], elements of each row."""
    return torch.repeat_interleave(lengths, output_size=total)

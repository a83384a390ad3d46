"""The samples of a tensor-parallel group: each rank loads and looks up its own, all ranks compute on all of them.

Gradients: every rank of a group has the gradient of the group's rows, times the data-parallel size. What flows back
to a rank's own rows is the sum over the group, and TorchRec divides by the number of ranks in the world: what is left
is the single-process gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import JaggedTensor

from hstu.data.batch import GroupBatch, HSTUBatch
from hstu.data.group import HostBatch, merge
from hstu.parallel.collectives import all_gather, gather_objects
from hstu.parallel.mesh import Mesh


def with_groups(batches: Iterator[HSTUBatch], item_feature: str, mesh: Mesh) -> Iterator[HSTUBatch]:
    """A rank's batches on the host, each with that of its tensor-parallel group; without one they are left as they are.

    Collective over the group: all its ranks must have equally many batches. Host memory is exchanged, over gloo.
    """
    return batches if mesh.tp_size == 1 else (gather_batch(batch, item_feature, mesh) for batch in batches)


def gather_batch(batch: HSTUBatch, item_feature: str, mesh: Mesh) -> HSTUBatch:
    """``batch`` with its ``group``, made of the batches that the ranks of the group hand in. Collective over it."""
    parts = gather_objects(HostBatch.of(batch, item_feature), mesh.tp_group)
    group = merge(parts, mesh.tp_rank)
    return dataclasses.replace(batch, group=group.pin_memory() if batch.labels.is_pinned() else group)


def embeddings_gatherer(mesh: Mesh) -> Callable[[Mapping[str, JaggedTensor], GroupBatch], dict[str, JaggedTensor]]:
    """What DenseModel takes as ``gather_rows``."""
    return lambda looked_up, group: gather_embeddings(looked_up, group, mesh.tp_group)


def gather_embeddings(
    looked_up: Mapping[str, JaggedTensor], group: GroupBatch, process_group: dist.ProcessGroup
) -> dict[str, JaggedTensor]:
    """The rows that all ranks of a group have looked up, feature by feature in the order of ``group.batch``.

    One collective for each width of tables; gradients flow back to ``looked_up``. Shared negatives are not exchanged.
    """
    keyed = group.batch.features.to_dict()
    by_width: dict[int, list[str]] = {}
    for feature in looked_up:
        if feature in group.num_values:
            by_width.setdefault(looked_up[feature].values().shape[1], []).append(feature)
    gathered = {feature: looked_up[feature].values() for feature in looked_up}
    for features in by_width.values():
        rows = [looked_up[feature].values() for feature in features]
        counts = [group.num_values[feature] for feature in features]
        gathered.update(zip(features, _gather_parts(rows, counts, process_group), strict=True))
    return {
        feature: JaggedTensor(rows, lengths=keyed[feature].lengths(), offsets=keyed[feature].offsets())
        for feature, rows in gathered.items()
    }


def _gather_parts(own: list[Tensor], counts: list[list[int]], process_group: dist.ProcessGroup) -> list[Tensor]:
    """For each tensor [n, D] those of all ranks, one after another. ``counts[i][r]``: rows of tensor i on rank r."""
    totals = [sum(of_rank) for of_rank in zip(*counts, strict=True)]
    longest = max(1, *totals)
    rows = torch.cat(own)
    padded = torch.cat([rows, rows.new_zeros((longest - len(rows), rows.shape[1]))])
    by_rank = all_gather(padded, process_group).unflatten(0, (len(totals), longest))
    pieces = [by_rank[rank, : totals[rank]].split([of_rank[rank] for of_rank in counts]) for rank in range(len(totals))]
    return [torch.cat(of_tensor) for of_tensor in zip(*pieces, strict=True)]

"""Merges the batches of a tp_cp group: each rank loads and looks up its own samples, all compute on all of them.

Each rank's gradient of the group's rows is scaled by the data-parallel size. With context parallelism it covers only
the rank's own tokens, and is also scaled by the context-parallel size. Backward sums over the group, and TorchRec
divides by the world size, which gives the gradient of a single process.
"""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from hstu.data.batches.batch import POOL, HSTUBatch, of_pool, packed, unpacked
from hstu.data.batches.train_batch import GroupLayout, TrainBatch, merge_ranks
from hstu.data.features.roles import FeatureRoles
from hstu.model.gr_model import GRModel
from hstu.model.stack import ModelOutput
from hstu.parallel.collectives import all_gather, gather_copies, start_max
from hstu.parallel.mesh import Mesh


def to_train_batch(batch: HSTUBatch, roles: FeatureRoles, mesh: Mesh, num_micro_batches: int = 1) -> TrainBatch:
    """Add to a rank's host batch its group's merged batch, for the dense part, and the size of the largest pool.

    Collective over tp_cp on gloo and, with in-batch negatives, over the data-parallel ranks without waiting.
    """
    computed, group = _merge_group(batch, roles.item, mesh) if mesh.tp_cp_size > 1 else (batch, None)
    pool = computed.negatives.pool_positions
    if pool is not None and mesh.dp_size > 1:
        largest = start_max(len(pool), mesh.dp_group, mesh.device)
        negatives = dataclasses.replace(computed.negatives, largest_pool=largest)
        computed = dataclasses.replace(computed, negatives=negatives)
        batch = computed if group is None else batch
    train_batch = TrainBatch.of(batch, computed, group, num_micro_batches, roles)
    return train_batch.pin_memory() if batch.labels.is_pinned() else train_batch


def evaluate_batch(model: GRModel, batch: HSTUBatch, mesh: Mesh) -> ModelOutput:
    """Run forward on a rank's host batch; only the loss covers the whole group. Collective over the tp_cp group."""
    own = dataclasses.replace(batch, seen=None)  # only the evaluators need ``seen``
    merged = to_train_batch(own, model.roles, mesh).to(mesh.device)
    output: ModelOutput = model.dense(look_up(model, merged, mesh), *merged.parts)
    if merged.group is None:
        return output
    logits, queries = output.logits, output.queries
    if logits is not None:
        logits = logits[merged.group.labels]
    if queries is not None:
        padding = batch.batch_size - batch.real_batch_size
        queries = functional.pad(queries[merged.group.sequences], (0, 0, 0, padding))
    return dataclasses.replace(output, logits=logits, queries=queries)


def _merge_group(batch: HSTUBatch, item_feature: str, mesh: Mesh) -> tuple[HSTUBatch, GroupLayout]:
    own_shapes, own_numbers = map(torch.from_numpy, packed(batch))
    shapes = gather_copies(own_shapes, mesh.tp_cp_group).numpy()
    padding = int(shapes[:, 0].max()) - len(own_numbers)
    numbers = gather_copies(functional.pad(own_numbers, (0, padding)), mesh.tp_cp_group).numpy()
    batches = [unpacked(batch, *of_rank) for of_rank in zip(shapes, numbers, strict=True)]
    return merge_ranks(batches, mesh.tp_cp_rank, item_feature)


def look_up(model: GRModel, batch: TrainBatch, mesh: Mesh) -> dict[str, Tensor]:
    """Look up the rows [n, dim] of sharded tables that the dense part reads, by feature or key of the pool.

    Collective: one all-gather per table width merges the ranks' rows, except shared negatives.
    """
    rows = model.look_up(batch.own)
    if batch.group is not None:
        by_width: dict[int, list[str]] = {}
        for feature in rows:
            if feature in batch.group.num_values:
                by_width.setdefault(rows[feature].shape[1], []).append(feature)
        for features in by_width.values():
            counts = [batch.group.num_values[feature] for feature in features]
            parts = _gather_parts([rows[name] for name in features], counts, mesh.tp_cp_group)
            rows.update(zip(features, parts, strict=True))
    # Rows of the pool, which all micro-batches share, are selected from the rows of the whole batch.
    positions = {} if batch.pool_positions is None else {POOL: (model.roles.item, batch.pool_positions)}
    if batch.pool_feature_positions is not None:
        of_features = batch.pool_feature_positions.to_dict()
        positions |= {of_pool(name): (name, found.values()) for name, found in of_features.items()}
    pool = {key: rows[name].index_select(0, found) for key, (name, found) in positions.items() if name in rows}
    return rows | pool


def _gather_parts(own: list[Tensor], counts: list[list[int]], process_group: dist.ProcessGroup) -> list[Tensor]:
    """Concatenate each tensor [n, D] over the ranks. ``counts[i][r]``: rows of tensor i on rank r."""
    totals = [sum(of_rank) for of_rank in zip(*counts, strict=True)]
    longest = max(1, *totals)
    rows = torch.cat(own)
    padded = functional.pad(rows, (0, 0, 0, longest - len(rows)))
    by_rank = all_gather(padded, process_group).unflatten(0, (len(totals), longest))
    pieces = [by_rank[rank, : totals[rank]].split([of_rank[rank] for of_rank in counts]) for rank in range(len(totals))]
    return [torch.cat(of_tensor) for of_tensor in zip(*pieces, strict=True)]

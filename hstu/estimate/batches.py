"""A training batch with the lengths of planned samples, and ids of no meaning."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np

from hstu.data.batches.batch import HSTUBatch, ItemFeatures, packed
from hstu.data.batches.collate import Assembler, Rows
from hstu.data.batches.train_batch import TrainBatch, merge_ranks
from hstu.data.sampling.sampler import START, BatchPlan
from hstu.estimate.workload import Batch, Workload


def train_batch(workload: Workload, batch: Batch) -> tuple[TrainBatch, int]:
    """What rank 0 of the group that trains on ``batch`` gets for a step, and the bytes that it sends to the others.

    The ranks of the group have equally many of the sequences.
    """
    roles, size, trainer = workload.roles, workload.group_size, workload.config.trainer
    batch_size = trainer.sequences_per_iteration
    own = [_rank_batch(workload, batch.part(rank, size), batch_size) for rank in range(size)]
    computed, group, sent = own[0], None, 0
    if size > 1:
        sent = len(pickle.dumps(packed(dataclasses.replace(own[0], position=None))))
        computed, group = merge_ranks(own, 0, roles.item)
        replicated = {name for spec in workload.specs if spec.replicated for name in spec.features}
        gathered = {name: counts for name, counts in group.num_values.items() if name not in replicated}
        group = dataclasses.replace(group, num_values=gathered)
    return TrainBatch.of(own[0], computed, group, trainer.gradient_accumulation_steps, roles), sent


def _rank_batch(workload: Workload, batch: Batch, batch_size: int) -> HSTUBatch:
    """The batch of one rank. Items are drawn uniformly."""
    config, roles, count = workload.config, workload.roles, batch.sequences
    rng = np.random.default_rng(0)
    labels, hard = int(batch.num_labels.sum()), 0 if workload.negatives is None else workload.negatives.hard
    list_lengths = {name: workload.list_lengths(name, batch.items) for name in roles.lists}
    numbers = sum(roles.number_widths)
    is_masked = config.retrieval is not None and config.retrieval.mask_seen

    def ids(size: int) -> np.ndarray:
        return np.zeros(size, dtype=np.int64)

    rows = Rows(
        user_ids=ids(count),
        lengths=batch.item_lengths,
        num_candidates=batch.num_candidates,
        num_labels=batch.num_labels,
        items=rng.integers(workload.corpus_size, size=batch.items),
        actions=None if roles.action is None else ids(batch.items),
        timestamps=ids(batch.items) if config.network.has_relative_bias else None,
        context={name: ids(count) for name in roles.contextual},
        side={name: ids(int(list_lengths[name].sum()) if name in list_lengths else batch.items) for name in roles.side},
        list_lengths=list_lengths,
        label_values={name: np.zeros(labels, dtype=np.float32) for name in roles.labels},
        numbers=np.zeros((batch.items, numbers), dtype=np.float32) if numbers else None,
        hard_negatives=np.zeros((batch.labels_with_history, hard), dtype=np.int64) if hard else None,
        seen=ids(0) if is_masked else None,
        seen_lengths=ids(count) if is_masked else None,
    )
    assembler = Assembler(
        batch_size,
        config.task,
        roles,
        workload.corpus_size,
        seed=0,
        negatives=workload.negatives,
        tower_features=lambda codes: ItemFeatures(
            {name: ids(int(workload.list_lengths(name, len(codes)).sum())) for name in roles.tower},
            {name: workload.list_lengths(name, len(codes)) for name in roles.tower_lists},
        ),
    )
    ordinals = np.arange(count, dtype=np.int64)
    return assembler.assemble(rows, BatchPlan(ordinals, ordinals, 0, 0, START))

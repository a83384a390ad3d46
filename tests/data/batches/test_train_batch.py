"""What the dense part computes on: merged batches of a tensor-parallel group, and micro-batches.

A merged batch is compared with one batch built from all its samples at once, a micro-batch with one of its own.
Training on them with every kind of negatives: tests/distributed, test_tensor_parallel.py and test_training.py.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu.data.batches.batch import HSTUBatch, packed, unpacked
from hstu.data.batches.train_batch import GroupLayout, TrainBatch, merge_ranks, split_micro_batches
from hstu.data.features.roles import FeatureRoles
from hstu.data.sampling.sampler import SamplerPosition
from tests.data.collators import assert_same, tensors_of
from tests.helpers import make_batch

ITEMS = [[3, 1, 3], [2], [4, 3], [7, 7, 1, 2]]
ACTIONS = [[5, 4, 5], [1], [1, 2], [0, 1, 2, 3]]
AGES = [6, 7, 8, 9]
TIMES = [[10, 20, 30], [5], [40, 50], [1, 2, 3, 4]]
SAMPLES = [0, 1, 2, 3]
ROLES = FeatureRoles("item", "action", ("age",))


def batch_of(samples: Sequence[int], padding: int, **options: Any) -> HSTUBatch:
    """A batch of some of the samples, then padding."""

    def chosen(rows: list[Any], filler: Any) -> list[Any]:
        return [rows[sample] for sample in samples] + [filler] * padding

    return make_batch(
        chosen(ITEMS, []), chosen(ACTIONS, []), {"age": chosen(AGES, 0)}, timestamp_lists=chosen(TIMES, []), **options
    )


def merged(*batches: HSTUBatch, rank: int = 0) -> tuple[HSTUBatch, GroupLayout]:
    """As a group does it: each rank sends its batch, and has one of its own to read those of the others."""
    return merge_ranks([unpacked(batches[rank], *packed(batch)) for batch in batches], rank, "item")


# --- tensor-parallel groups ----------------------------------------------------------------------------------------


BEFORE = [[8], [], [9, 9], [3, 5]]
"""What the users of the samples had before."""


def before(samples: Sequence[int], padding: int) -> dict[str, Any]:
    return {"task": "retrieval", "seen_lists": [BEFORE[sample] for sample in samples] + [[]] * padding}


def test_a_merged_batch_has_what_the_users_of_all_ranks_had_before() -> None:
    ranks = [batch_of(samples, 1, **before(samples, 1)) for samples in ([0, 1], [2, 3])]
    assert_same(merged(*ranks)[0], batch_of(SAMPLES, 2, **before(SAMPLES, 2)))


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_padding_of_every_rank_comes_last(task: str) -> None:
    pool = task == "retrieval"
    batch, layout = merged(
        batch_of([0, 1], 1, task=task, in_batch_pool=pool),
        batch_of([], 3, task=task, in_batch_pool=pool),
        batch_of([2, 3], 1, task=task, in_batch_pool=pool),
    )
    assert_same(batch, batch_of([0, 1, 2, 3], 5, task=task, in_batch_pool=pool))
    assert layout.num_values == {"age": [2, 0, 2], "item": [4, 0, 6], "action": [4, 0, 6]}


def test_held_out_items_are_merged_by_sequence() -> None:
    first = batch_of([0], 1, task="retrieval_eval", labels=[11, -1], negatives=[])
    second = batch_of([1, 2], 0, task="retrieval_eval", labels=[12, 13], negatives=[])
    batch, layout = merged(first, second, rank=1)
    assert batch.labels.tolist() == [11, 12, 13, -1]
    assert batch.user_ids.tolist() == [0, 0, 1, -1]
    assert layout.labels == slice(0, 0)


# --- micro-batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "padding", "count"), [(SAMPLES, 0, 2), (SAMPLES, 0, 4), ([0, 1, 2], 3, 3)])
def test_a_micro_batch_is_the_batch_of_its_own_sequences(samples: Sequence[int], padding: int, count: int) -> None:
    batch = batch_of(samples, padding, num_candidates=[*[1, 1, 2, 1][: len(samples)], *[0] * padding])
    size = (len(samples) + padding) // count
    for number, part in enumerate(split_micro_batches(batch, count, ROLES)):
        own = [*samples][number * size : (number + 1) * size]
        candidates = batch.num_candidates_host[number * size : (number + 1) * size].tolist()
        assert_same(part, batch_of(own, size - len(own), num_candidates=candidates))


# --- both ----------------------------------------------------------------------------------------------------------


def test_a_train_batch_moves_as_a_whole() -> None:
    own = batch_of([0], 1, task="retrieval", in_batch_pool=True)
    whole, layout = merged(own, batch_of([2], 1, task="retrieval", in_batch_pool=True))
    parts = split_micro_batches(whole, 2, ROLES)
    batch = TrainBatch(own=own, parts=parts, group=layout, pool_positions=whole.negatives.pool_positions)
    moved = batch.to(torch.device("meta"))
    assert moved.features is moved.own.features and moved.group is layout
    assert moved.pool_positions is not None and moved.pool_positions.is_meta
    for part in (moved.own, *moved.parts):
        assert part.labels.is_meta and part.features.values().is_meta
    assert [part.real_batch_size for part in moved.parts] == [2, 0]
    alone = TrainBatch(own=own, parts=(own,)).to(torch.device("meta"))
    assert alone.parts[0] is alone.own, "nothing is copied twice"


def full_batch() -> HSTUBatch:
    """A batch in which every optional field is present."""
    batch = make_batch(
        [[3, 1, 3], [], [2, 1]],
        [[5, 4, 5], [], [1, 2]],
        {"age": [6, 0, 7]},
        task="retrieval",
        timestamp_lists=[[10, 20, 30], [], [40, 50]],
        negatives=[8, 9],
        draws=[[0, 1], [1, 1], [0, 0]],
        in_batch_pool=True,
        seen_lists=[[3, 1], [], [2]],
    )
    return dataclasses.replace(batch, position=SamplerPosition(1, 2))


def test_moving_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = full_batch()
    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert {tensor.device.type for tensor in tensors_of(moved).values()} == {"meta"}
    assert batch.labels.device.type == "cpu"
    assert moved.item_lengths is batch.item_lengths and moved.position == SamplerPosition(1, 2)
    assert isinstance(moved.features, KeyedJaggedTensor) and moved.features.length_per_key() == [2, 5, 5, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pinning and streams")
def test_a_pinned_batch_is_copied_on_a_side_stream() -> None:
    batch, stream = full_batch().pin_memory(), torch.cuda.Stream()
    assert all(tensor.is_pinned() for tensor in tensors_of(batch).values())
    with torch.cuda.stream(stream):
        moved = batch.to(torch.device("cuda"), non_blocking=True)
    torch.cuda.current_stream().wait_stream(stream)
    moved.record_stream(torch.cuda.current_stream())
    for name, tensor in tensors_of(batch).items():
        assert torch.equal(tensor, tensors_of(moved)[name].cpu()), name

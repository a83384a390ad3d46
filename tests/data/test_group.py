"""The batch of a tensor-parallel group against one batch that was made of all its samples at once."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from hstu.data.batch import NEGATIVES, GroupBatch, HSTUBatch
from hstu.data.group import HostBatch, merge
from tests.helpers import make_batch

ITEMS = [[3, 1, 3], [2], [4, 3], [7, 7, 1, 2]]
ACTIONS = [[5, 4, 5], [1], [1, 2], [0, 1, 2, 3]]
AGES = [6, 7, 8, 9]
TIMES = [[10, 20, 30], [5], [40, 50], [1, 2, 3, 4]]


def part(samples: list[int], padding: int, **options: Any) -> HSTUBatch:
    """A batch of some of the samples, then padding."""

    def chosen(rows: list[Any], filler: Any) -> list[Any]:
        return [rows[sample] for sample in samples] + [filler] * padding

    return make_batch(
        chosen(ITEMS, []),
        chosen(ACTIONS, []),
        {"age": chosen(AGES, 0)},
        timestamp_lists=chosen(TIMES, []),
        **options,
    )


def merged(*batches: HSTUBatch, rank: int = 0) -> GroupBatch:
    hosts = [pickle.loads(pickle.dumps(HostBatch.of(batch, "item"))) for batch in batches]
    return merge(hosts, rank)


def assert_same(batch: HSTUBatch, expected: HSTUBatch) -> None:
    assert batch.features.keys() == expected.features.keys()
    assert batch.features.values().tolist() == expected.features.values().tolist()
    assert batch.features.lengths().tolist() == expected.features.lengths().tolist()
    for name in ("num_candidates", "num_labels", "labels", "timestamps", "draws", "pool_positions"):
        mine, theirs = getattr(batch, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        assert mine is None or (mine.dtype == theirs.dtype and mine.tolist() == theirs.tolist()), name
    assert batch.real_batch_size == expected.real_batch_size
    assert batch.num_labels_total == expected.num_labels_total
    np.testing.assert_array_equal(batch.item_lengths, expected.item_lengths)
    np.testing.assert_array_equal(batch.num_candidates_host, expected.num_candidates_host)


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_padding_of_every_rank_comes_last(task: str) -> None:
    pool = task == "retrieval"
    group = merged(
        part([0, 1], 1, task=task, in_batch_pool=pool),
        part([], 3, task=task, in_batch_pool=pool),
        part([2, 3], 1, task=task, in_batch_pool=pool),
    )
    assert_same(group.batch, part([0, 1, 2, 3], 5, task=task, in_batch_pool=pool))
    assert group.num_values == {"age": [2, 0, 2], "item": [4, 0, 6], "action": [4, 0, 6]}


def test_a_rank_knows_its_own_samples_and_labels() -> None:
    parts = [part([0, 1], 1, num_candidates=[1, 0, 0]), part([], 3), part([2, 3], 1, num_candidates=[1, 2, 0])]
    for rank, (sequences, labels) in enumerate([((0, 2), (0, 1)), ((2, 2), (1, 1)), ((2, 4), (1, 4))]):
        group = merged(*parts, rank=rank)
        assert (group.sequences.start, group.sequences.stop) == sequences
        assert (group.labels.start, group.labels.stop) == labels


def test_draws_point_at_the_negatives_of_their_own_rank() -> None:
    first = part([1, 2], 0, task="retrieval", negatives=[8, 9], draws=[[1, 0]])
    second = part([0], 1, task="retrieval", negatives=[9, 4, 5], draws=[[2, 1], [0, 0]])
    group = merged(first, second)
    expected = part([1, 2, 0], 1, task="retrieval", negatives=[8, 9, 9, 4, 5], draws=[[1, 0], [4, 3], [2, 2]])
    assert_same(group.batch, expected)
    assert group.num_values[NEGATIVES] == [2, 3]


def test_negatives_that_all_ranks_share_stand_once() -> None:
    parts = [part(samples, 1, task="retrieval", negatives=[8, 9]) for samples in ([0], [2, 3])]
    group = merged(*parts)
    assert_same(group.batch, part([0, 2, 3], 2, task="retrieval", negatives=[8, 9]))
    assert NEGATIVES not in group.num_values


def test_raw_draws_of_in_batch_negatives_stay() -> None:
    first = part([1, 2], 0, task="retrieval", in_batch_pool=True, draws=[[2**31 - 1]])
    second = part([0], 0, task="retrieval", in_batch_pool=True, draws=[[7], [8]])
    assert merged(first, second).batch.draws.tolist() == [[2**31 - 1], [7], [8]]  # type: ignore[union-attr]


def test_held_out_items_are_those_of_the_sequences() -> None:
    first = part([0], 1, task="retrieval_eval", labels=[11, -1], negatives=[])
    second = part([1, 2], 0, task="retrieval_eval", labels=[12, 13], negatives=[])
    group = merged(first, second, rank=1)
    assert group.batch.labels.tolist() == [11, 12, 13, -1]
    assert group.batch.user_ids.tolist() == [0, 0, 1, -1]
    assert group.labels == slice(0, 0)


def test_a_group_moves_with_its_batch() -> None:
    batch = part([0], 1)
    batch.group = merged(batch, part([2], 1))
    moved = batch.to(torch.device("meta"))
    assert moved.group is not None
    assert moved.group.batch.labels.device.type == "meta"
    assert moved.group.batch.features.values().device.type == "meta"
    assert moved.group.num_values == batch.group.num_values

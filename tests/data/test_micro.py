"""Micro-batches hold the sequences of a batch once each, and what belongs to the batch as a whole all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hstu.data.batch import NEGATIVES, POOL, HSTUBatch
from hstu.data.micro import split, with_micro_batches
from hstu.pipeline.boundary import Boundary
from tests.data.test_group import assert_same, merged, part

SAMPLES = [0, 1, 2, 3]


def parts_of(batch: HSTUBatch, count: int) -> list[HSTUBatch]:
    return [micro.batch for micro in split(batch, count, "item")]


@pytest.mark.parametrize(("samples", "padding", "count"), [(SAMPLES, 0, 2), (SAMPLES, 0, 4), ([0, 1, 2], 3, 3)])
def test_a_part_is_the_batch_of_its_own_sequences(samples: Sequence[int], padding: int, count: int) -> None:
    batch = part(list(samples), padding, num_candidates=[*[1, 1, 2, 1][: len(samples)], *[0] * padding])
    size = (len(samples) + padding) // count
    for number, micro in enumerate(parts_of(batch, count)):
        own = [*samples][number * size : (number + 1) * size]
        candidates = batch.num_candidates_host[number * size : (number + 1) * size].tolist()
        assert_same(micro, part(own, size - len(own), num_candidates=candidates))


def test_rows_say_where_the_values_of_a_part_stand() -> None:
    batch = part(SAMPLES, 2)
    keyed = batch.features.to_dict()
    for micro in split(batch, 3, "item"):
        for feature, jagged in micro.batch.features.to_dict().items():
            assert jagged.values().tolist() == keyed[feature].values()[micro.rows[feature]].tolist()


def test_every_part_has_the_pool_of_the_whole_batch() -> None:
    batch = part(SAMPLES, 0, task="retrieval", in_batch_pool=True)
    whole = batch.features["item"].values()[batch.pool_positions].tolist()
    assert whole == sorted(set(whole)) and len(whole) == 5
    for micro in parts_of(batch, 2):
        assert micro.pool_positions is None and micro.pool_ids is not None and micro.pool_ids.tolist() == whole


def test_every_part_has_all_negatives_and_the_draws_of_its_own_labels() -> None:
    draws = np.arange(12, dtype=np.int32).reshape(6, 2) % 5
    batch = part(SAMPLES, 0, task="retrieval", negatives=[9, 8, 7, 6, 5], draws=draws)
    micro = split(batch, 2, "item")
    for one in micro:
        keyed = one.batch.features[NEGATIVES]
        assert keyed.values().tolist() == [9, 8, 7, 6, 5] and keyed.lengths().tolist() == [5, 0]
        assert one.rows[NEGATIVES] == slice(0, 5)
    assert [one.batch.labels.tolist() for one in micro] == [[1, 3], [3, 7, 1, 2]]
    assert torch.cat([one.batch.draws for one in micro]).tolist() == draws.tolist()


def test_one_micro_batch_is_the_batch_as_it_is() -> None:
    batch = part(SAMPLES, 0)
    assert list(with_micro_batches(iter([batch]), 1, "item")) == [batch]


def test_the_batch_of_a_group_is_what_is_cut_where_there_is_one() -> None:
    own = part([0, 1], 0)
    own.group = merged(own, part([2], 1))
    (cut,) = with_micro_batches(iter([own]), 2, "item")
    assert cut.group is not None and not cut.micro
    assert [micro.batch.real_batch_size for micro in cut.computed.micro] == [2, 1]
    assert_same(cut.computed.micro[0].batch, own)


def test_gradients_of_all_parts_come_back_as_one() -> None:
    batch = part(SAMPLES, 2, task="retrieval", in_batch_pool=True)
    batch.micro = split(batch, 3, "item")
    table = torch.randn(10, 4, requires_grad=True)

    def rows(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, table)

    items = batch.features["item"]
    assert batch.pool_positions is not None
    looked_up = {"item": type(items)(rows(items.values()), lengths=items.lengths())}
    pooled = looked_up["item"].values()[batch.pool_positions]
    looked_up[POOL] = type(items)(pooled, lengths=torch.tensor([len(pooled)]))

    def loss(own: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        return (own @ pool.T).square().sum()

    (expected,) = torch.autograd.grad(loss(looked_up["item"].values(), pooled), table, retain_graph=True)
    boundary = Boundary(looked_up, batch)
    for part_rows, _ in boundary.parts():
        loss(part_rows["item"].values(), part_rows[POOL].values()).backward()
    assert table.grad is None, "nothing reaches the table before it is handed back"
    boundary.hand_back(boundary.gradients()).backward()
    torch.testing.assert_close(table.grad, expected)

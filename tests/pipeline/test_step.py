"""Gradients of looked-up rows wait until those of all micro-batches are known."""

import torch
from torch.nn import functional

from hstu.data.batches.batch import POOL
from hstu.data.batches.train_batch import split_micro_batches
from hstu.pipeline.step import collect_row_gradients, detach_rows
from tests.data.batches.test_train_batch import ROLES, SAMPLES, batch_of


def test_rows_of_a_micro_batch_are_those_of_its_ids() -> None:
    batch = batch_of(SAMPLES, 2)
    keyed = batch.features.to_dict()
    parts = split_micro_batches(batch, 3, ROLES)
    rows = {name: jagged.values().float()[:, None] for name, jagged in keyed.items()}
    for leaf, part in zip(detach_rows(rows, parts), parts, strict=True):
        for name, own in leaf.items():
            assert own.flatten().tolist() == part.features[name].values().tolist()


def test_gradients_of_all_micro_batches_come_back_as_one() -> None:
    batch = batch_of(SAMPLES, 2, task="retrieval", in_batch_pool=True)
    table = torch.randn(10, 4, requires_grad=True)
    items = functional.embedding(batch.features["item"].values(), table)
    rows = {"item": items, POOL: items[batch.negatives.pool_positions]}

    def loss(own: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        return (own @ pool.T).square().sum()

    (expected,) = torch.autograd.grad(loss(rows["item"], rows[POOL]), table, retain_graph=True)
    leaves = detach_rows(rows, split_micro_batches(batch, 3, ROLES))
    for leaf in leaves:
        loss(leaf["item"], leaf[POOL]).backward()
    assert table.grad is None, "no gradient reaches the table by itself"
    torch.autograd.backward(list(rows.values()), collect_row_gradients(rows, leaves))
    torch.testing.assert_close(table.grad, expected)

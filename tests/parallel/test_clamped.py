"""Gradients of rows that are cut to a limit."""

from __future__ import annotations

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from hstu.parallel.clamped import clamp_row_sums


@pytest.mark.parametrize("count", [0, 1, 200])
def test_the_sum_of_a_row_is_cut_and_stands_at_its_first_place(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    rows = torch.randint(0, 50, (count,), generator=generator)
    gradients = torch.randn((count, 4), generator=generator)
    found = clamp_row_sums(gradients, rows, 1.5)
    expected = torch.zeros((count, 4), dtype=torch.float64)
    for row in rows.unique().tolist():
        places = (rows == row).nonzero()[:, 0]
        expected[places[0]] = gradients[places].double().sum(0).clamp(-1.5, 1.5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert count < 200 or {-1.5, 1.5} < set(found.flatten().tolist())


def test_fbgemm_clips_what_each_look_up_contributes_and_not_the_row() -> None:
    """Were this to change, gradient_clipping could take the place of ClampedFusedEmbedding."""
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(2, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_SGD,
        learning_rate=1.0,
        gradient_clipping=True,
        max_gradient=1.0,
        pooling_mode=PoolingMode.NONE,
    )
    (weight,) = table.split_embedding_weights()
    weight.zero_()
    gradients = torch.tensor([[0.75] * 4, [0.75] * 4, [3.0] * 4])
    table(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2, 3])).backward(gradients)
    assert weight[:, 0].tolist() == [-1.5, -1.0]

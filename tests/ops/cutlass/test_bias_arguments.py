"""The tables that the CUTLASS kernels read for a relative bias, and the gradients made of their sums."""

import numpy as np
import pytest
import torch

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed")

from hstu.ops.cutlass.bias import CELL_BITS, NUM_CELLS, BiasArguments, BiasSums, cells
from hstu.ops.kernels import AttentionConfig, RelativeBias
from hstu.ops.layout import NUM_TIME_BUCKETS, bucket_thresholds, time_buckets
from hstu.ops.self_check import small_layout

CPU = torch.device("cpu")


def kernel_buckets(differences: torch.Tensor) -> torch.Tensor:
    """Buckets by the arithmetic of ``hstu.ops.cutlass.bias.bucket_of``."""
    thresholds, below = cells(CPU)
    bits = differences.double().view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    cell = ((bits >> 32) - 0x3FF00000).clamp(min=0) >> (20 - CELL_BITS)
    return below[cell] + (bits >= thresholds[cell]).int()


def test_the_cell_of_a_time_difference_gives_its_bucket_exactly() -> None:
    exact = torch.arange(-100_000, 100_000)
    thresholds = bucket_thresholds(CPU)
    borders = thresholds[thresholds < 2**52]
    drawn = torch.from_numpy(np.exp(np.random.default_rng(0).uniform(0, 36, 200_000)).astype(np.int64))
    for differences in (exact, borders - 1, borders, borders + 1, -borders, drawn, torch.tensor([2**53])):
        assert torch.equal(kernel_buckets(differences), time_buckets(differences).int())


def test_every_cell_lies_in_two_buckets_at_most() -> None:
    _, below = cells(CPU)
    assert len(below) == NUM_CELLS and int(below.diff()[1 << CELL_BITS :].max()) <= 1


def test_distances_beyond_the_table_have_its_outermost_weights_and_gradients() -> None:
    layout = small_layout(CPU)
    longest = int(layout.seqlens.max())
    bias = RelativeBias(torch.arange(2.0 * 10 - 1), torch.zeros(NUM_TIME_BUCKETS))
    arguments = BiasArguments.of(bias, layout)
    assert arguments.center == longest and len(arguments.position_weight) == 2 * longest + 1
    assert arguments.position_weight[longest - 9 : longest + 10].tolist() == list(range(19))
    assert arguments.position_weight[0] == 0 and arguments.position_weight[-1] == 18
    sums = BiasSums(torch.ones(2 * longest + 1, dtype=torch.int64), torch.zeros(128, dtype=torch.int64), torch.ones(1))
    gradients = sums.gradients(bias, AttentionConfig(1.0, 1)).position_weight
    assert gradients.tolist() == [longest - 8] + [1] * 17 + [longest - 8]


def test_the_table_of_a_model_is_read_as_it_is() -> None:
    bias = RelativeBias(torch.randn(2 * 1000 - 1), torch.randn(NUM_TIME_BUCKETS))
    arguments = BiasArguments.of(bias, small_layout(CPU))
    assert arguments.center == 999 and arguments.position_weight.data_ptr() == bias.position_weight.data_ptr()

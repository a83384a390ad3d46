"""Pools of negatives: duplicates over ranks, padding, and draws that no number of ranks changes."""

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hstu.data.batches.batch import PADDING_ID
from hstu.model.retrieval import choose_from_pool, first_occurrences
from hstu.ops.pytorch.softmax_loss import l2_normalize

POOLS = st.lists(st.integers(-2, 8) | st.just(PADDING_ID), max_size=20).map(
    lambda ids: torch.tensor(ids, dtype=torch.int64)
)


@given(POOLS)
def test_the_first_of_equal_ids_is_valid_and_padding_never_is(ids: Tensor) -> None:
    expected = [id_ != PADDING_ID and id_ not in ids[:place].tolist() for place, id_ in enumerate(ids.tolist())]
    assert first_occurrences(ids).tolist() == expected


@given(POOLS, st.randoms(use_true_random=False))
def test_draws_mean_the_same_items_however_the_pool_is_spread(ids: Tensor, random: Random) -> None:
    """A pool in any order, with any repetitions and padding, against its distinct ids."""
    distinct = torch.tensor(sorted(set(ids.tolist()) - {PADDING_ID}), dtype=torch.int64)
    if not len(distinct):
        return
    shuffled = [*ids.tolist(), *distinct.tolist(), PADDING_ID]
    random.shuffle(shuffled)
    gathered = torch.tensor(shuffled)
    draws = torch.tensor([[0, 2**31 - 1, 2**30], [7**10, 12345, 2**31 - 7]], dtype=torch.int32)
    chosen = gathered[choose_from_pool(draws, gathered)]
    assert torch.equal(chosen, distinct[choose_from_pool(draws, distinct)])
    assert chosen[0, :2].tolist() == [distinct[0], distinct[-1]]


def test_draws_are_uniform_over_the_distinct_ids() -> None:
    ids = torch.tensor([5, 5, 5, 5, PADDING_ID, PADDING_ID, 2, 9])
    draws = torch.randint(2**31, (300, 100), generator=torch.Generator().manual_seed(0)).int()
    counts = np.unique(ids[choose_from_pool(draws, ids)], return_counts=True)
    assert counts[0].tolist() == [2, 5, 9]
    np.testing.assert_allclose(counts[1], 10_000, rtol=0.03)


def test_normalised_vectors_have_norm_one_unless_they_are_too_short() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-3, 4e-3]], requires_grad=True)
    normalised = l2_normalize(vectors, eps=1e-2)
    torch.testing.assert_close(normalised, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.3, 0.4]]))
    (gradient,) = torch.autograd.grad(normalised.sum(), vectors)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_norms_are_kept_in_float32_at_least(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert l2_normalize(torch.ones((2, 3), dtype=dtype), eps=1e-6).dtype == expected

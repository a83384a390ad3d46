"""The softmax losses against a loop over queries in float64, their gradients, and their edge cases."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hstu.ops.pytorch.softmax_loss as implementation
from hstu.ops.kernels import NEVER_SEEN, SeenItems
from tests.ops.backends import pool_softmax_loss, sampled_softmax_loss

TEMPERATURE = 0.1


def oracle(queries, positives, negatives_of_row) -> Tensor:
    """One query at a time; ``negatives_of_row(i)``: vectors and log weights of what it is compared with, and a mask."""
    total = queries.new_zeros(())
    for i, (query, positive) in enumerate(zip(queries, positives, strict=True)):
        vectors, log_weights, is_negative = negatives_of_row(i)
        negative_logits = (vectors @ query / TEMPERATURE + log_weights)[is_negative]
        positive_logit = (query @ positive / TEMPERATURE).reshape(1)
        total = total + torch.cat([positive_logit, negative_logits]).logsumexp(0) - positive_logit[0]
    return total


def is_negative(target_ids, pool_ids, seen, i) -> Tensor:
    """bool [S]: whether the i-th query meets each entry of the pool."""
    if seen is None:
        return pool_ids != target_ids[i]
    return torch.tensor([int(place) > int(seen.places[i]) for place in seen.first[seen.sequences[i]]], dtype=torch.bool)


def pool_oracle(queries, positives, pool, target_ids, pool_ids, log_weights, seen=None) -> Tensor:
    added = torch.zeros(len(pool)) if log_weights is None else log_weights
    return oracle(queries, positives, lambda i: (pool, added, is_negative(target_ids, pool_ids, seen, i)))


def sampled_oracle(queries, positives, pool, draws, target_ids, pool_ids, log_weights, seen=None) -> Tensor:
    added = torch.zeros(len(pool)) if log_weights is None else log_weights

    def drawn(i):
        rows = draws[i].long()
        return pool[rows], added[rows], is_negative(target_ids, pool_ids, seen, i)[rows]

    return oracle(queries, positives, drawn)


WEIGHTS = st.sampled_from(["none", "some", "finite", "all zero"])


def make_log_weights(kind, size):
    """None, weights of which some or all are zero, or weights above zero."""
    weights = torch.linspace(-3, 3, size, dtype=torch.float64)
    if kind == "some":
        weights[::3] = -torch.inf
    return {"none": None, "all zero": torch.full_like(weights, -torch.inf)}.get(kind, weights)


def make_case(num_queries, pool_size, dim=4, num_ids=5, seed=0, dtype=torch.float64):
    """Normalised vectors that require gradients, and ids from so small a range that targets meet negatives."""
    generator = torch.Generator().manual_seed(seed)
    queries, positives, pool = (
        F.normalize(torch.randn(n, dim, generator=generator, dtype=dtype), dim=1).requires_grad_()
        for n in (num_queries, num_queries, pool_size)
    )
    target_ids = torch.randint(num_ids, (num_queries,), generator=generator)
    pool_ids = torch.randint(num_ids, (pool_size,), generator=generator)
    return queries, positives, pool, target_ids, pool_ids


def make_draws(num_queries, num_draws, pool_size, dtype=torch.int32):
    generator = torch.Generator().manual_seed(num_draws)
    return torch.randint(max(pool_size, 1), (num_queries, num_draws), generator=generator).to(dtype)


def make_seen(num_queries, pool_size, seed=0, num_sequences=3, device="cpu"):
    """Items that sequences have never, before they begin, or from one of 8 places on; queries in any order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    first = draw(-1, 8, num_sequences, pool_size)
    first[draw(0, 2, num_sequences, pool_size) == 1] = NEVER_SEEN
    tensors = first, draw(0, num_sequences, num_queries), draw(0, 8, num_queries)
    return SeenItems(*(tensor.to(device) for tensor in tensors))


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(3 * loss, leaves)


@settings(max_examples=60, deadline=None)
@given(
    num_queries=st.integers(0, 9),
    pool_size=st.integers(0, 12),
    num_ids=st.integers(1, 20),
    weights=WEIGHTS,
    masks_seen=st.booleans(),
    block=st.sampled_from([1 << 20, 12, 1]),
    seed=st.integers(0, 2**31 - 1),
)
def test_pool_loss_and_gradients_equal_the_oracle(num_queries, pool_size, num_ids, weights, masks_seen, block, seed):
    queries, positives, pool, target_ids, pool_ids = make_case(num_queries, pool_size, num_ids=num_ids, seed=seed)
    log_weights = make_log_weights(weights, pool_size)
    seen = make_seen(num_queries, pool_size, seed) if masks_seen else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(implementation.BLOCK_ELEMENTS, "cpu", block)
        patch.setattr(implementation, "MIN_BLOCK_ROWS", 2)
        actual = pool_softmax_loss(queries, positives, pool, target_ids, pool_ids, log_weights, TEMPERATURE, seen=seen)
        actual_gradients = gradients(actual, queries, positives, pool)
    # A zero from every leaf keeps them in the oracle's graph when nothing is summed.
    leaves = (queries, positives, pool)
    expected = pool_oracle(*leaves, target_ids, pool_ids, log_weights, seen) + sum(0 * leaf.sum() for leaf in leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    for got, want in zip(actual_gradients, gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    num_queries=st.integers(0, 9),
    pool_size=st.integers(1, 12),
    num_draws=st.integers(0, 30),
    num_ids=st.integers(1, 20),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    weights=WEIGHTS,
    masks_seen=st.booleans(),
    block=st.sampled_from([1 << 20, 12, 1]),
    seed=st.integers(0, 2**31 - 1),
)
def test_sampled_loss_and_gradients_equal_the_oracle(
    num_queries, pool_size, num_draws, num_ids, index_dtype, weights, masks_seen, block, seed
):
    queries, positives, pool, target_ids, pool_ids = make_case(num_queries, pool_size, num_ids=num_ids, seed=seed)
    draws = make_draws(num_queries, num_draws, pool_size, index_dtype)
    leaves = (queries, positives, pool)
    log_weights = make_log_weights(weights, pool_size)
    seen = make_seen(num_queries, pool_size, seed) if masks_seen else None
    ids = target_ids, pool_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(implementation.BLOCK_ELEMENTS, "cpu", block)
        actual = sampled_softmax_loss(*leaves, draws, *ids, TEMPERATURE, log_weights=log_weights, seen=seen)
    actual_gradients = gradients(actual, *leaves)
    expected = sampled_oracle(*leaves, draws, *ids, log_weights, seen) + sum(0 * leaf.sum() for leaf in leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    for got, want in zip(actual_gradients, gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("low_precision", [torch.bfloat16, torch.float32])
def test_scores_are_kept_in_float32_even_under_autocast(low_precision):
    queries, positives, pool, target_ids, pool_ids = make_case(64, 50, dim=16, num_ids=40)
    expected = pool_oracle(
        *(v.to(low_precision).double() for v in (queries, positives, pool)), target_ids, pool_ids, None
    )
    vectors = [v.detach().to(low_precision).requires_grad_() for v in (queries, positives, pool)]
    draws = torch.arange(50, dtype=torch.int32).repeat(64, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = pool_softmax_loss(*vectors, target_ids, pool_ids, None, TEMPERATURE)
        sampled = sampled_softmax_loss(*vectors, draws, target_ids, pool_ids, TEMPERATURE)
    for loss in (whole, sampled):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
        assert all(g.dtype == low_precision for g in gradients(loss, *vectors))


def test_a_well_learnt_target_still_has_an_exact_gradient():
    """p − 1 would be 0 in float32 here; the true gradient is not."""
    query = torch.tensor([[1.0, 0.0]], requires_grad=True)
    positive, pool = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    loss = pool_softmax_loss(query, positive, pool, torch.tensor([0]), torch.tensor([1]), None, 0.1)
    (gradient,) = torch.autograd.grad(loss, query)
    expected = -2 / 0.1 * torch.exp(torch.tensor(-20.0))
    torch.testing.assert_close(gradient[0, 0], expected, rtol=1e-4, atol=0)


def test_whole_pool_memory_is_bounded_by_a_block(monkeypatch):
    """The largest matrix the loss makes has a block's size, not that of queries × pool."""
    monkeypatch.setitem(implementation.BLOCK_ELEMENTS, "cpu", 1 << 12)
    monkeypatch.setattr(implementation, "MIN_BLOCK_ROWS", 16)
    queries, positives, pool, target_ids, pool_ids = make_case(300, 700, num_ids=1000)

    class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    with LargestTensor() as largest:
        pool_softmax_loss(queries, positives, pool, target_ids, pool_ids, None, TEMPERATURE).backward()
    assert 0 < largest.elements <= 1 << 12

"""The softmax losses against a loop over queries in float64, their gradients, and their edge cases."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import hstu.ops.pytorch.softmax_loss as implementation
from hstu.estimate.record import Recorder
from hstu.ops import functional
from hstu.ops.fake import fake_kernels
from hstu.ops.kernels import NEVER_SEEN, Backend, Negatives, SeenItems
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from tests.helpers import Allocations
from tests.ops.backends import softmax_loss

TEMPERATURE = 0.1


def oracle(vectors: Sequence[Tensor], negatives: Negatives) -> Tensor:
    """One query at a time."""
    queries, positives, pool = vectors
    seen, log_weights = negatives.seen, negatives.log_weights
    added = torch.zeros(len(pool)) if log_weights is None else log_weights
    total = torch.stack([0 * vector.sum() for vector in vectors]).sum()  # so that every vector has a gradient
    for i, (query, positive) in enumerate(zip(queries, positives, strict=True)):
        if seen is None:
            is_negative = negatives.pool_ids != negatives.target_ids[i]
        else:
            is_negative = seen.first[seen.sequences[i]] > seen.positions[i]
        rows = torch.arange(len(pool)) if negatives.draws is None else negatives.draws[i].long()
        logits = (pool[rows] @ query / TEMPERATURE + added[rows])[is_negative[rows]]
        positive_logit = (query @ positive / TEMPERATURE).reshape(1)
        total = total + torch.cat([positive_logit, logits]).logsumexp(0) - positive_logit[0]
    return total


def make_case(
    num_queries: int, pool_size: int, dim: int = 4, num_ids: int = 5, seed: int = 0
) -> tuple[list[Tensor], Negatives]:
    """Normalized vectors that require gradients, and ids from so small a range that targets meet negatives."""
    generator = torch.Generator().manual_seed(seed)
    vectors = [
        F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1).requires_grad_()
        for n in (num_queries, num_queries, pool_size)
    ]
    target_ids, pool_ids = (torch.randint(num_ids, (n,), generator=generator) for n in (num_queries, pool_size))
    return vectors, Negatives(target_ids, pool_ids, TEMPERATURE)


def make_log_weights(kind: str, size: int) -> Tensor | None:
    """None, weights of which some or all are zero, or weights above zero."""
    weights = torch.linspace(-3, 3, size, dtype=torch.float64)
    if kind == "some":
        weights[::3] = -torch.inf
    return {"none": None, "all zero": torch.full_like(weights, -torch.inf)}.get(kind, weights)


def make_seen(num_queries: int, pool_size: int, seed: int = 0) -> SeenItems:
    """Items that 3 sequences have never, before they begin, or from one of 8 positions on; queries in any order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    first = draw(-1, 8, 3, pool_size)
    first[draw(0, 2, 3, pool_size) == 1] = NEVER_SEEN
    return SeenItems(first, draw(0, 3, num_queries), draw(0, 8, num_queries))


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(3 * loss, leaves)


@settings(max_examples=100, deadline=None)
@given(
    num_queries=st.integers(0, 9),
    pool_size=st.integers(0, 12),
    num_draws=st.none() | st.integers(0, 30),
    num_ids=st.integers(1, 20),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    weights=st.sampled_from(["none", "some", "finite", "all zero"]),
    masks_seen=st.booleans(),
    block=st.sampled_from([1 << 20, 12, 1]),
    seed=st.integers(0, 2**31 - 1),
)
def test_loss_and_gradients_equal_the_oracle(
    num_queries: int,
    pool_size: int,
    num_draws: int | None,
    num_ids: int,
    index_dtype: torch.dtype,
    weights: str,
    masks_seen: bool,
    block: int,
    seed: int,
) -> None:
    pool_size += num_draws is not None
    vectors, negatives = make_case(num_queries, pool_size, num_ids=num_ids, seed=seed)
    seen = make_seen(num_queries, pool_size, seed) if masks_seen else None
    draws = None if num_draws is None else torch.randint(pool_size, (num_queries, num_draws)).to(index_dtype)
    negatives = replace(negatives, log_weights=make_log_weights(weights, pool_size), seen=seen, draws=draws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(implementation.BLOCK_ELEMENTS, "cpu", block)
        patch.setattr(implementation, "MIN_BLOCK_ROWS", 2)
        actual = softmax_loss(vectors, negatives)
        actual_gradients = gradients(actual, vectors)
    expected = oracle(vectors, negatives)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    for got, want in zip(actual_gradients, gradients(expected, vectors), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("draws", [None, torch.arange(50, dtype=torch.int32).repeat(64, 1)], ids=["pool", "draws"])
@pytest.mark.parametrize("low_precision", [torch.bfloat16, torch.float32])
def test_scores_are_kept_in_float32_even_under_autocast(low_precision: torch.dtype, draws: Tensor | None) -> None:
    vectors, negatives = make_case(64, 50, dim=16, num_ids=40)
    expected = oracle([v.to(low_precision).double() for v in vectors], negatives)
    vectors = [v.detach().to(low_precision).requires_grad_() for v in vectors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = softmax_loss(vectors, replace(negatives, draws=draws))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    assert all(g.dtype == low_precision for g in gradients(loss, vectors))


def test_a_well_learnt_target_still_has_an_exact_gradient() -> None:
    """p − 1 would be 0 in float32 here; the true gradient is not."""
    query = torch.tensor([[1.0, 0.0]], requires_grad=True)
    positive, pool = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    loss = softmax_loss([query, positive, pool], Negatives(torch.tensor([0]), torch.tensor([1]), 0.1))
    (gradient,) = torch.autograd.grad(loss, query)
    expected = -2 / 0.1 * torch.exp(torch.tensor(-20.0))
    torch.testing.assert_close(gradient[0, 0], expected, rtol=1e-4, atol=0)


def test_whole_pool_memory_is_bounded_by_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest matrix the loss makes has a block's size, not queries × pool."""
    monkeypatch.setitem(implementation.BLOCK_ELEMENTS, "cpu", 1 << 12)
    monkeypatch.setattr(implementation, "MIN_BLOCK_ROWS", 16)
    vectors, negatives = make_case(300, 700, num_ids=1000)
    with Allocations([]) as allocations:
        softmax_loss(vectors, negatives).backward()
    assert 0 < allocations.largest <= 1 << 12


@pytest.mark.parametrize(("backend", "masks"), [(Backend.TRITON, False), (Backend.CUTLASS, True)])
@pytest.mark.parametrize(("queries", "pool"), [(1300, 3700), (4096, 100_000), (700, 400_000)])
def test_estimates_allocate_what_the_loss_over_a_pool_does_on_a_gpu(
    backend: Backend, masks: bool, queries: int, pool: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(implementation.BLOCK_ELEMENTS, "cpu", implementation.BLOCK_ELEMENTS["cuda"])
    peaks = []
    with FakeTensorMode():
        vectors, negatives = make_case(queries, pool, dim=50)
        negatives = replace(negatives, seen=make_seen(queries, pool) if masks else None)
        for is_fake in (True, False):
            with Recorder() as recorder:
                kernels = fake_kernels(backend, "cuda", recorder.report) if is_fake else REFERENCE_KERNELS
                functional.softmax_loss(vectors[0], vectors[1], vectors[2], negatives, kernels.pool_softmax_loss)
            peaks.append(sum(recorder.recording.peak.values()))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


def test_tensors_without_values_leave_no_memory_for_the_next_loss() -> None:
    real = torch.ones(1)
    with FakeTensorMode() as mode:
        implementation._memory_of_scores(mode.from_tensor(real), 1 << 20)
    implementation._memory_of_scores(real.to("meta"), 1 << 20)
    kept = implementation._memory_of_scores(real, 1 << 20)
    assert type(kept) is Tensor and kept.device == real.device


def test_gradients_scaled_in_place_are_those_of_a_retained_graph() -> None:
    vectors, negatives = make_case(20, 30, num_ids=40)
    loss = softmax_loss(vectors, negatives)
    kept = [torch.autograd.grad(3 * loss, vectors, retain_graph=True) for _ in range(2)]
    for once, twice, last in zip(*kept, torch.autograd.grad(3 * loss, vectors), strict=True):
        assert torch.equal(once, twice) and torch.equal(once, last)

"""Negatives: duplicates over ranks, padding, draws that no number of ranks changes, seen items, logQ correction."""

import dataclasses
from collections import defaultdict
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu.base.hashing import random_bits
from hstu.data.batches.batch import PADDING_ID
from hstu.data.sampling.negatives import Negatives, expected_log_counts
from hstu.model.retrieval import LogCounts, choose_from_pool, find_seen, first_occurrences
from hstu.ops import kernels
from hstu.ops.kernels import NEVER_SEEN, Backend
from hstu.ops.pytorch.softmax_loss import l2_normalize
from tests.helpers import make_batch
from tests.model.test_retrieval import (
    DIM,
    DISTINCT,
    HISTORIES,
    KINDS,
    NUM_ITEMS,
    assert_same_loss_and_gradients,
    loss_by_loop,
    make_model,
    run,
)
from tests.ops.backends import kernels_of, softmax_loss

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


def test_normalised_vectors_have_norm_one_unless_they_are_too_short() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-3, 4e-3]], requires_grad=True)
    normalised = l2_normalize(vectors, eps=1e-2)
    torch.testing.assert_close(normalised, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.3, 0.4]]))
    (gradient,) = torch.autograd.grad(normalised.sum(), vectors)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_norms_are_kept_in_float32_at_least(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert l2_normalize(torch.ones((2, 3), dtype=dtype), eps=1e-6).dtype == expected


LARGEST = int(np.iinfo(np.int64).max)
IDS = st.integers(-3, 6) | st.sampled_from([LARGEST, -LARGEST])
USERS = st.lists(st.tuples(st.lists(IDS, max_size=4), st.lists(IDS, max_size=7)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(USERS, st.lists(IDS | st.just(PADDING_ID), max_size=12))
def test_every_entry_of_a_pool_has_the_place_at_which_each_user_first_had_its_item(
    users: list[tuple[list[int], list[int]]], pool: list[int]
) -> None:
    before, items = [[*row] for row in zip(*users, strict=True)]
    batch = make_batch(items, task="retrieval", seen_lists=before)
    ends = np.cumsum(batch.item_lengths)
    targets = [end - back for end, row in zip(ends, items, strict=True) for back in range(len(row) - 1, 0, -1)]
    seen = find_seen(torch.tensor(pool, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64), batch, "item")
    expected = []
    for earlier, row in zip(before, items, strict=True):
        first = defaultdict(lambda: NEVER_SEEN, {item: row.index(item) for item in row} | dict.fromkeys(earlier, -1))
        expected.append([first[item] for item in pool])
    assert seen.first.shape == (len(users), len(pool)) and seen.first.tolist() == expected
    places = [(user, place) for user, row in enumerate(items) for place in range(1, len(row))]
    assert list(zip(seen.sequences.tolist(), seen.positions.tolist(), strict=True)) == places


BEFORE = [[0, 7, 9], [], [1], [11, 11, 3], []]
"""What the users of HISTORIES had before."""
SEEN_OF_STEP = [
    {*before, *items[:place]} for before, items in zip(BEFORE, HISTORIES, strict=True) for place in range(1, len(items))
]


@pytest.mark.parametrize("backend", [Backend.PYTORCH, Backend.CPU])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_a_loop_that_leaves_out_what_the_user_has_seen(kind: str, backend: Backend) -> None:
    options, negatives_of_step = KINDS[kind]
    model, table = make_model(kernels=kernels_of(backend, DIM))
    model.args = dataclasses.replace(model.args, mask_seen=True)
    batch = make_batch(HISTORIES, task="retrieval", seen_lists=BEFORE, **options)
    loss = run(model, table, batch).loss_sum

    def unseen(step: int) -> list[int]:
        return [item for item in negatives_of_step(step) if item not in SEEN_OF_STEP[step]]

    expected = loss_by_loop(model, table, unseen)
    assert_same_loss_and_gradients(loss, expected, [table, *model.parameters()])
    without_earlier = make_batch(HISTORIES, task="retrieval", **options)
    assert not torch.isclose(run(model, table, without_earlier).loss_sum, loss)


LOG_COUNTS = torch.linspace(-2.5, 1.0, NUM_ITEMS)


@pytest.mark.parametrize("by_id", [False, True], ids=["codes", "raw_ids"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
def test_corrected_loss_and_gradients_equal_a_loop_over_steps(kind: str, by_id: bool) -> None:
    options, negatives_of_step = KINDS[kind]
    # An in-batch draw stands for one of the distinct items: the model divides by their number.
    extra = -float(np.log(len(DISTINCT))) if kind == "in_batch, draws" else 0.0
    order = torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(0))
    log_counts = LogCounts(LOG_COUNTS[order], order) if by_id else LogCounts(LOG_COUNTS)
    model, table = make_model(log_counts=log_counts)
    loss = run(model, table, make_batch(HISTORIES, task="retrieval", **options)).loss_sum
    expected = loss_by_loop(model, table, negatives_of_step, LOG_COUNTS + extra)
    assert_same_loss_and_gradients(loss, expected, [table, *model.parameters()])
    plain, _ = make_model()
    assert not torch.isclose(run(plain, table, make_batch(HISTORIES, task="retrieval", **options)).loss_sum, loss)


def test_mixed_negatives_without_a_correction_count_each_entry_once() -> None:
    model, table = make_model()
    zeros, _ = make_model(log_counts=LogCounts(torch.zeros(NUM_ITEMS)))
    batch = make_batch(HISTORIES, task="retrieval", negatives=[7, 7, 3, 0], in_batch_pool=True)
    assert run(model, table, batch).loss_sum == run(zeros, table, batch).loss_sum


def test_items_that_repeat_over_ranks_and_padding_count_once() -> None:
    model, table = make_model(log_counts=LogCounts(LOG_COUNTS))
    batch = make_batch(HISTORIES, task="retrieval", in_batch_pool=True)
    alone = run(model, table, batch).loss_sum
    model.gather_pool = lambda rows, ids, largest: (
        torch.cat([rows, rows, torch.zeros_like(rows[:2])]),
        torch.cat([ids, ids, torch.full((2,), PADDING_ID)]),
    )
    torch.testing.assert_close(run(model, table, batch).loss_sum, alone)


@pytest.mark.parametrize("raw_ids", [[5, -(2**62), 7, 2**62], [3, 2, 1, 0]])
def test_counts_of_any_ids(raw_ids: list[int]) -> None:
    log_counts = LogCounts(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor(raw_ids))
    asked = torch.tensor([*raw_ids[::-1], PADDING_ID])
    assert log_counts(asked)[:4].tolist() == [3.0, 2.0, 1.0, 0.0]


def test_model_state_has_no_counts() -> None:
    model, _ = make_model(log_counts=LogCounts(LOG_COUNTS))
    assert not [name for name in model.state_dict() if "log_counts" in name]


# --- what the correction is for -------------------------------------------------------------------------------------

CORPUS, QUERIES, NUM_DRAWS = 60, 8, 60_000


def full_and_sampled(shares: Tensor, log_counts: Tensor) -> tuple[list[Tensor], ...]:
    """Loss and gradients of the full softmax, and of many draws by ``shares`` with and without the correction."""
    torch.manual_seed(0)
    vectors = [F.normalize(torch.randn(rows, 8), dim=1).requires_grad_() for rows in (QUERIES, CORPUS)]
    ids, targets = torch.arange(CORPUS), torch.arange(QUERIES)
    draws = torch.multinomial(shares, QUERIES * NUM_DRAWS, replacement=True).view(QUERIES, NUM_DRAWS)

    def result(loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, vectors)]

    def sampled(log_weights: Tensor | None) -> list[Tensor]:
        queries, items = vectors
        negatives = kernels.Negatives(targets, ids, 0.3, log_weights, draws=draws)
        return result(softmax_loss([queries, items[:QUERIES], items], negatives))

    queries, items = vectors
    full = result(F.cross_entropy(queries @ items.t() / 0.3, targets, reduction="sum"))
    return full, sampled(-log_counts), sampled(None)


@pytest.mark.parametrize("kind", ["skewed", "uniform"])
def test_many_corrected_draws_give_the_softmax_of_the_corpus(kind: str) -> None:
    weights = torch.ones(CORPUS) if kind == "uniform" else torch.arange(1, CORPUS + 1) ** 1.5
    shares = weights / weights.sum()
    of_uniform = torch.from_numpy(expected_log_counts(Negatives("uniform", NUM_DRAWS), np.zeros(CORPUS), 1))
    full, corrected, plain = full_and_sampled(
        shares, of_uniform if kind == "uniform" else torch.log(NUM_DRAWS * shares)
    )
    for got, want in zip(corrected, full, strict=True):
        assert (got - want).norm() < 0.02 * want.norm()
    assert plain[0] > 1.5 * full[0]
    for got, want in zip(plain[1:], full[1:], strict=True):
        assert kind == "uniform" or (got - want).norm() > 0.08 * want.norm()


def test_many_corrected_batches_give_the_sum_over_the_corpus() -> None:
    """In-batch negatives, whole and drawn: the mean over batches of Σ e^s / Q is the sum of e^s over all items."""
    rng = np.random.default_rng(0)
    samples = np.stack([rng.choice(30, 5, replace=False, p=np.arange(1, 31) / 465) for _ in range(60)])
    counts = np.bincount(samples.ravel(), minlength=30)
    exponentials = torch.from_numpy(np.exp(rng.normal(size=30)) * (counts > 0))
    weights = {
        num: torch.exp(-torch.from_numpy(expected_log_counts(Negatives("in_batch", num), counts, 10))) for num in (0, 8)
    }
    whole, drawn = [], []
    for epoch in range(150):
        for batch in np.split(rng.permutation(60), 10):
            pool = torch.from_numpy(np.unique(samples[batch]))
            whole.append((exponentials * weights[0])[pool].sum())
            raw = torch.from_numpy(random_bits(epoch, int(batch[0]), np.arange(8)) >> np.uint64(33)).int()
            chosen = pool[choose_from_pool(raw[None], pool)[0]]
            drawn.append(len(pool) * (exponentials * weights[8])[chosen].sum())
    expected = float(exponentials.sum())
    assert float(torch.stack(whole).mean()) == pytest.approx(expected, rel=0.05)
    assert float(torch.stack(drawn).mean()) == pytest.approx(expected, rel=0.05)
    assert float(exponentials[pool].sum()) < 0.8 * expected

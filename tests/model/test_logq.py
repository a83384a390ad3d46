"""The logQ correction: sampled negatives of each kind estimate the softmax over the whole corpus."""

from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.base.hashing import random_bits
from hstu.data.batches.batch import PADDING_ID
from hstu.data.sampling.negatives import ItemDistribution, Negatives, expected_log_counts
from hstu.model.retrieval import LogCounts, choose_from_pool
from hstu.ops import kernels
from tests.helpers import make_batch
from tests.model.test_retrieval import (
    DISTINCT,
    HISTORIES,
    KINDS,
    NUM_ITEMS,
    assert_same_loss_and_gradients,
    loss_by_loop,
    make_model,
    run,
)
from tests.ops.backends import softmax_loss

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


def full_and_sampled(negatives: Negatives, weights: np.ndarray | None) -> tuple[list[Tensor], ...]:
    """Loss and gradients of the full softmax, and of many draws with and without the correction."""
    torch.manual_seed(0)
    vectors = [F.normalize(torch.randn(rows, 8), dim=1).requires_grad_() for rows in (QUERIES, CORPUS)]
    ids, targets = torch.arange(CORPUS), torch.arange(QUERIES)
    corpus = ItemDistribution(CORPUS, weights)
    bits = random_bits(1, np.arange(QUERIES)[:, None], np.arange(NUM_DRAWS)) >> np.uint64(32)
    draws = torch.from_numpy(corpus.items(bits.astype(np.uint32)))
    log_counts = torch.from_numpy(expected_log_counts(negatives, corpus, np.zeros(CORPUS, dtype=np.int64), 1))

    def result(loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, vectors)]

    def sampled(log_weights: Tensor | None) -> list[Tensor]:
        queries, items = vectors
        negatives = kernels.Negatives(targets, ids, 0.3, log_weights, draws=draws)
        return result(softmax_loss([queries, items[:QUERIES], items], negatives))

    queries, items = vectors
    full = result(F.cross_entropy(queries @ items.t() / 0.3, targets, reduction="sum"))
    return full, sampled(-log_counts), sampled(None)


@pytest.mark.parametrize("kind", ["popularity", "uniform"])
def test_many_corrected_draws_give_the_softmax_of_the_corpus(kind: Literal["popularity", "uniform"]) -> None:
    weights = None if kind == "uniform" else np.arange(1, CORPUS + 1) ** 1.5
    full, corrected, plain = full_and_sampled(Negatives(kind, NUM_DRAWS), weights)
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
        num: torch.exp(
            -torch.from_numpy(expected_log_counts(Negatives("in_batch", num), ItemDistribution(30), counts, 10))
        )
        for num in (0, 8)
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

"""Evaluation against a loop over users, whatever the chunks, blocks, ties and ranks."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hstu.train.evaluate as evaluate
from hstu.model.outputs import ModelOutput
from hstu.train.evaluate import Corpus, Queries, observe_ranking, observe_retrieval, recommend, target_ranks
from hstu.train.metrics import RankingMetrics, retrieval_metrics
from hstu.train.observations import Observations, of_ranking
from tests.helpers import make_batch

EPS = 1e-6


def make_queries(vectors, targets, seen) -> Queries:
    return Queries(
        vectors=F.normalize(torch.as_tensor(vectors, dtype=torch.float32), dim=1),
        user_ids=np.arange(len(targets)),
        targets=np.array(targets, dtype=np.int64),
        seen_items=np.array([item for row in seen for item in row], dtype=np.int64),
        seen_lengths=np.array([len(row) for row in seen], dtype=np.int64),
    )


def make_corpus(table, chunk_items=10**6) -> Corpus:
    return Corpus(lambda ids: table[ids], torch.arange(len(table)), EPS, chunk_items)


def ranks_by_loop(queries: Queries, table: torch.Tensor) -> np.ndarray:
    """Exact only where scores are sums of small integers, as those of ``grid_case``."""
    scores = (queries.vectors @ F.normalize(table, dim=1).t()).double().numpy()
    offsets = np.concatenate([[0], np.cumsum(queries.seen_lengths)])
    ranks = []
    for user, target in enumerate(queries.targets):
        seen = set(queries.seen_items[offsets[user] : offsets[user + 1]].tolist())
        rivals = [scores[user, item] for item in range(len(table)) if item not in seen and item != target]
        own = scores[user, target]
        ranks.append(1 + sum(s > own for s in rivals) + sum(s == own for s in rivals) / 2)
    return np.array(ranks)


def grid_case(num_users, num_items, seed):
    """Vectors of four entries ±1/2 have norm 1, and every score is exact: −1, −1/2, 0, 1/2 or 1, with many ties."""
    rng = np.random.default_rng(seed)
    table = torch.from_numpy(rng.choice([-0.5, 0.5], (num_items, 4))).float()
    vectors = rng.choice([-0.5, 0.5], (num_users, 4))
    targets = rng.integers(0, num_items, num_users)
    seen = [rng.integers(0, num_items, rng.integers(0, 2 * num_items)).tolist() for _ in range(num_users)]
    return make_queries(vectors, targets, seen), table


@settings(max_examples=80, deadline=None)
@given(
    num_users=st.integers(1, 9),
    num_items=st.integers(1, 12),
    chunk_items=st.integers(1, 15),
    block_queries=st.integers(1, 10),
    seed=st.integers(0, 2**31 - 1),
)
def test_ranks_equal_a_loop_over_users(num_users, num_items, chunk_items, block_queries, seed):
    """Ties, repeated seen items, seen targets, chunks and blocks that do not divide their totals."""
    queries, table = grid_case(num_users, num_items, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "BLOCK_QUERIES", block_queries)
        actual = target_ranks(queries, make_corpus(table, chunk_items))
    np.testing.assert_array_equal(actual, ranks_by_loop(queries, table))


@pytest.mark.parametrize("chunk_items", [977, 250, 10**6])
def test_equal_items_tie_exactly_wherever_they_stand(chunk_items):
    """Every item stands three times in the corpus, so each target ties with two others: ranks are 2, 5, 8 …"""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn((333, 50), generator=generator)
    table = distinct.repeat(3, 1)[torch.randperm(999, generator=generator)]
    queries = make_queries(torch.randn((700, 50), generator=generator), np.arange(700), [[]] * 700)
    ranks = target_ranks(queries, make_corpus(table, chunk_items))
    assert len(set(ranks)) > 100
    np.testing.assert_array_equal(ranks % 3, 2)


def test_ranks_are_the_places_in_sorted_order():
    generator = torch.Generator().manual_seed(1)
    table, vectors = torch.randn((2000, 16), generator=generator), torch.randn((40, 16), generator=generator)
    queries = make_queries(vectors, np.arange(40) * 7, [[]] * 40)
    by_score = (queries.vectors.double() @ F.normalize(table, dim=1).double().t()).argsort(dim=1, descending=True)
    expected = [(row == target).nonzero().item() + 1 for row, target in zip(by_score, queries.targets, strict=True)]
    np.testing.assert_array_equal(target_ranks(queries, make_corpus(table, 300)), expected)


def test_a_model_that_gives_nan_ranks_last_not_first():
    queries, table = grid_case(3, 8, seed=0)
    diverged = Queries(
        queries.vectors * math.nan, queries.user_ids, queries.targets, np.zeros(0, int), np.zeros(3, int)
    )
    assert (target_ranks(diverged, make_corpus(table, 3)) >= 8).all()


def test_recommend_gives_the_best_unseen_items_in_order():
    generator = torch.Generator().manual_seed(2)
    table = torch.randn((30, 8), generator=generator)
    queries = make_queries(torch.randn((5, 8), generator=generator), [0] * 5, [[1, 2], [], [3] * 9, [29, 0], [5]])
    codes, scores = recommend(queries, make_corpus(table, 7), k=4)
    expected = queries.vectors @ F.normalize(table, dim=1).t()
    for user, seen in enumerate([[1, 2], [], [3], [29, 0], [5]]):
        expected[user, seen] = -math.inf
    expected_scores, expected_codes = expected.topk(4, dim=1)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)


def test_recommend_more_items_than_there_are():
    queries, table = grid_case(1, 6, seed=0)
    queries = make_queries(queries.vectors, [0], [[2, 4, 4]])
    codes, scores = recommend(queries, make_corpus(table, 4), k=100)
    assert codes.shape == (1, 6)
    assert set(codes[0, :4]) == {0, 1, 3, 5} and codes[0, 4:].tolist() == [-1, -1]
    assert np.isinf(scores[0, 4:]).all() and not np.isinf(scores[0, :4]).any()


def test_only_the_ids_of_a_corpus_are_ranked_and_other_targets_are_misses():
    """Ids are any int64. A corpus of some ids ranks as the table of those rows does."""
    queries, table = grid_case(6, 9, seed=4)
    ids = np.sort(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 9))
    row_of = {id_: row for row, id_ in enumerate(ids.tolist())}

    def embed(wanted):
        return table[[row_of[id_] for id_ in wanted.tolist()]]

    by_id = Queries(
        queries.vectors, queries.user_ids, ids[queries.targets], ids[queries.seen_items], queries.seen_lengths
    )
    ranks = target_ranks(by_id, Corpus(embed, torch.from_numpy(ids), EPS, 4))
    np.testing.assert_array_equal(ranks, ranks_by_loop(queries, table))
    positions, _ = recommend(by_id, Corpus(embed, torch.from_numpy(ids), EPS, 4), k=3)
    np.testing.assert_array_equal(positions, recommend(queries, make_corpus(table, 4), k=3)[0])

    without = ids[ids != by_id.targets[0]]
    fewer = target_ranks(by_id, Corpus(embed, torch.from_numpy(without), EPS, 4))
    assert np.isinf(fewer[by_id.targets == by_id.targets[0]]).all()
    assert np.isfinite(fewer[by_id.targets != by_id.targets[0]]).all()
    nothing = target_ranks(by_id, Corpus(embed, torch.zeros(0, dtype=torch.int64), EPS, 4))
    assert retrieval_metrics(["HR@500", "NDCG@500", "MRR"], nothing) == {"HR@500": 0, "NDCG@500": 0, "MRR": 0}


def test_items_whose_rows_are_zeros_are_no_candidates():
    queries, table = grid_case(3, 8, seed=1)
    table[[2, 5]] = 0
    queries = make_queries(queries.vectors, [2, 0, 5], [[]] * 3)
    ranks = target_ranks(queries, make_corpus(table, 3))
    assert np.isinf(ranks[[0, 2]]).all() and 1 <= ranks[1] <= 6
    positions, _ = recommend(queries, make_corpus(table, 3), k=8)
    assert not {2, 5} & set(positions.flatten().tolist()) and (positions == -1).sum() == 6


class LastItemModel(nn.Module):
    """Its query is the row of a sequence's last item; dropout would make it random."""

    def __init__(self, table):
        super().__init__()
        self.table, self.dropout = nn.Parameter(table), nn.Dropout(0.5)

    def forward(self, batch) -> ModelOutput:
        is_real = torch.from_numpy(batch.item_lengths > 0)
        last = batch.features["item"].values()[np.cumsum(batch.item_lengths)[is_real.numpy()] - 1]
        queries = torch.zeros(batch.batch_size, self.table.shape[1])
        queries[is_real] = F.normalize(self.dropout(self.table)[last], dim=1)
        return ModelOutput(torch.zeros(()), torch.zeros((), dtype=torch.int64), queries=queries)


def retrieval_batches():
    table = torch.randn((20, 6), generator=torch.Generator().manual_seed(3))
    histories = [[3, 4], [7], [1, 2, 9], [5, 5], [11, 0]]
    targets, seen = [8, 9, 2, 0, 19], [[13, 3, 4], [7], [1, 2, 9], [5, 5], [11, 0]]
    first = make_batch(histories[:3], task="retrieval_eval", labels=targets[:3], seen_lists=seen[:3])
    second = make_batch(
        [*histories[3:], []], task="retrieval_eval", labels=[*targets[3:], -1], seen_lists=[*seen[3:], []]
    )
    queries = make_queries(table[[row[-1] for row in histories]], targets, seen)
    return LastItemModel(table), [first, second], ranks_by_loop(queries, table)


def observe_batches(model, batches, **options) -> Observations:
    corpus = Corpus(lambda ids: model.table[ids], torch.arange(20), EPS, chunk_items=6)
    return observe_retrieval(model, batches, corpus, model, **options)


def evaluate_batches(model, batches):
    return retrieval_metrics(["HR@1", "HR@10", "NDCG@10", "MRR", "HR@500"], observe_batches(model, batches).results)


def test_retrieval_evaluation_ignores_padding_and_leaves_the_model_as_it_was():
    model, batches, ranks = retrieval_batches()
    result = evaluate_batches(model, batches)
    assert result == retrieval_metrics(list(result), ranks)
    assert result["HR@500"] == 1.0  # K beyond the corpus
    assert model.training and model.table.requires_grad


def test_without_seen_items_nothing_is_filtered():
    model, batches, ranks = retrieval_batches()
    for batch in batches:
        batch.seen_values = batch.seen_offsets = None
    unfiltered = evaluate_batches(model, batches)
    assert unfiltered["MRR"] < retrieval_metrics(["MRR"], ranks)["MRR"]  # the last item itself ranks first


def test_retrieval_over_two_ranks_equals_one_process():
    model, batches, _ = retrieval_batches()
    second = iter(vars(observe_batches(model, batches[1:])).values())
    both = observe_batches(model, batches[:1], gather=lambda array: np.concatenate([array, next(second)]))
    alone = observe_batches(model, batches)
    for name in ("users", "items", "history", "results", "labels"):
        np.testing.assert_array_equal(getattr(both, name), getattr(alone, name))
    assert alone.history.tolist() == [2, 1, 3, 2, 2] and alone.items.tolist() == [8, 9, 2, 0, 19]


def test_a_rank_with_padding_only_still_takes_part_in_every_lookup():
    model, batches, _ = retrieval_batches()
    calls: list[int] = []

    def embed(ids):
        calls.append(len(ids))
        return model.table[ids]

    for rank_batches in (batches, [make_batch([[], []], task="retrieval_eval", labels=[-1, -1])]):
        observe_retrieval(model, rank_batches, Corpus(embed, torch.arange(20), EPS, chunk_items=6), model)
    assert calls[: len(calls) // 2] == calls[len(calls) // 2 :] == [6] * 8


class RatingModel(nn.Module):
    """Logits of the classes 1 … 5: the item's id is where the mass is."""

    def forward(self, batch) -> ModelOutput:
        logits = F.one_hot(batch.features["item"].values(), 5).float()
        return ModelOutput(torch.zeros(()), batch.num_labels.sum(), logits=logits)


def test_ranking_evaluation_attributes_labels_to_users():
    batch = make_batch([[0, 4, 2], [3, 1], []], [[1, 5, 2], [1, 4], []])
    metrics = RankingMetrics(("GAUC", "ACC", "AUC>=4"), num_tasks=None, label_offset=1)
    model = RatingModel()
    found = observe_ranking(model, [batch, make_batch([[], []], [[], []])], "item", model)
    metrics.update(found.results, found.labels, found.users)
    result = metrics.compute()
    assert found.items.tolist() == [0, 4, 2, 3, 1] and found.history.tolist() == [0, 1, 2, 0, 1]
    candidates = make_batch([[0, 4, 2], [3, 1]], [[1, 5, 2], [1, 4]], num_candidates=[2, 1])
    assert observe_ranking(model, [], "item", model).results.shape == (0, 1)
    found = of_ranking(candidates, "item", np.zeros((3, 5)), candidates.labels.numpy(), np.array([7, 8]))
    assert (found.items.tolist(), found.history.tolist()) == ([4, 2, 1], [1, 1, 1])
    assert (found.labels.tolist(), found.requests.tolist()) == ([5, 2, 4], [7, 7, 8])
    assert result["ACC"] == 2 / 5
    # P(rating >= 4) is high for items 3 and 4; the ratings >= 4 belong to items 4 and 1.
    assert result["AUC>=4"] == pytest.approx((2.5 + 1) / 6)
    alone = RankingMetrics(("GAUC",), num_tasks=None, label_offset=1)
    alone.update(np.eye(5, dtype=np.float32)[[0, 4, 2, 3, 1]], np.array([1, 5, 2, 1, 4]), np.array([0, 0, 0, 1, 1]))
    assert result["GAUC"] == alone.compute()["GAUC"]

"""The ranks and the best of all items against a loop over users, whatever the chunks, blocks and ties."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import hstu.train.corpus as corpus_module
from hstu.train.corpus import Corpus, Queries, recommend, target_ranks
from hstu.train.metrics import retrieval_metrics

EPS, CHUNK = 1e-6, 64


def make_queries(
    vectors: Tensor | np.ndarray | Sequence[Sequence[float]],
    targets: Sequence[int] | np.ndarray,
    seen: Sequence[Sequence[int]],
) -> Queries:
    return Queries(
        vectors=F.normalize(torch.as_tensor(vectors, dtype=torch.float32), dim=1),
        user_ids=np.arange(len(targets)),
        targets=np.array(targets, dtype=np.int64),
        seen_items=np.array([item for row in seen for item in row], dtype=np.int64),
        seen_lengths=np.array([len(row) for row in seen], dtype=np.int64),
    )


def make_corpus(table: Tensor, chunk_items: int = 10**6) -> Corpus:
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
        rank = 1 + sum(s > own for s in rivals) + sum(s == own for s in rivals) / 2
        ranks.append(math.inf if target in seen else rank)
    return np.array(ranks)


def grid_case(num_users: int, num_items: int, seed: int) -> tuple[Queries, Tensor]:
    """Vectors of four entries ±1/2 have norm 1, and every score is exact: −1, −1/2, 0, 1/2 or 1, with many ties."""
    rng = np.random.default_rng(seed)
    table = torch.from_numpy(rng.choice([-0.5, 0.5], (num_items, 4))).float()
    vectors = rng.choice([-0.5, 0.5], (num_users, 4))
    targets = rng.integers(0, num_items, num_users)
    seen = [rng.integers(0, num_items, rng.integers(0, num_items)).tolist() for _ in range(num_users)]
    return make_queries(vectors, targets, seen), table


def best_by_loop(queries: Queries, table: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact only where ``ranks_by_loop`` is."""
    scores = (queries.vectors @ F.normalize(table, dim=1).t()).numpy()
    seen = np.split(queries.seen_items, np.cumsum(queries.seen_lengths)[:-1])
    for user, items in enumerate(seen):
        scores[user, items] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best_scores = np.take_along_axis(scores, best, axis=1)
    return np.where(best_scores == -np.inf, -1, best), best_scores


@settings(max_examples=80, deadline=None)
@given(
    num_users=st.integers(1, 9),
    num_items=st.integers(1, 40),
    chunk_items=st.integers(1, 50),
    product_items=st.integers(1, 20),
    block_queries=st.integers(1, 10),
    k=st.integers(1, 12),
    seed=st.integers(0, 2**31 - 1),
)
def test_ranks_and_best_items_equal_a_loop_over_users(
    num_users: int, num_items: int, chunk_items: int, product_items: int, block_queries: int, k: int, seed: int
) -> None:
    """Ties, repeated seen items, seen targets, and chunks, products and blocks that do not divide their totals."""
    queries, table = grid_case(num_users, num_items, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "BLOCK_QUERIES", block_queries)
        patch.setattr(corpus_module, "CPU_PRODUCT_ITEMS", product_items)
        ranks = target_ranks(queries, make_corpus(table, chunk_items))[0]
        best = recommend(queries, make_corpus(table, chunk_items), k)
    np.testing.assert_array_equal(ranks, ranks_by_loop(queries, table))
    for found, expected in zip(best, best_by_loop(queries, table, k), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_items_that_become_better_and_better_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is better than all before it, so all wait, and are chosen from often. Every score stands three times."""
    monkeypatch.setattr(corpus_module, "CPU_PRODUCT_ITEMS", 20)
    angles = torch.linspace(1.5, 0, 600).repeat_interleave(3)
    queries = make_queries([[1, 0], [-1, 0]], [0, 0], [[], []])
    items, scores = recommend(queries, make_corpus(torch.stack([angles.cos(), angles.sin()], dim=1)), k=9)
    assert items.tolist() == [[1797, 1798, 1799, 1794, 1795, 1796, 1791, 1792, 1793], [0, 1, 2, 3, 4, 5, 6, 7, 8]]
    np.testing.assert_allclose(scores[0], angles.cos().flip(0)[:9], rtol=1e-6)


@pytest.mark.parametrize("chunk_items", [977, 250, 10**6])
def test_equal_items_tie_exactly_wherever_they_stand(chunk_items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every item stands three times in the corpus, so each target ties with two others: ranks are 2, 5, 8 …"""
    monkeypatch.setattr(corpus_module, "CPU_PRODUCT_ITEMS", 300)
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn((333, 50), generator=generator)
    table = distinct.repeat(3, 1)[torch.randperm(999, generator=generator)]
    queries = make_queries(torch.randn((700, 50), generator=generator), np.arange(700), [[]] * 700)
    ranks = target_ranks(queries, make_corpus(table, chunk_items))[0]
    assert len(set(ranks)) > 100
    np.testing.assert_array_equal(ranks % 3, 2)


def test_ranks_are_the_places_in_sorted_order() -> None:
    generator = torch.Generator().manual_seed(1)
    table, vectors = torch.randn((2000, 16), generator=generator), torch.randn((40, 16), generator=generator)
    queries = make_queries(vectors, np.arange(40) * 7, [[]] * 40)
    by_score = (queries.vectors.double() @ F.normalize(table, dim=1).double().t()).argsort(dim=1, descending=True)
    expected = [(row == target).nonzero().item() + 1 for row, target in zip(by_score, queries.targets, strict=True)]
    np.testing.assert_array_equal(target_ranks(queries, make_corpus(table, 300))[0], expected)


def test_what_is_nan_ranks_last_not_first_and_is_never_recommended() -> None:
    queries, table = grid_case(3, 8, seed=0)
    diverged = Queries(
        queries.vectors * math.nan, queries.user_ids, queries.targets, np.zeros(0, int), np.zeros(3, int)
    )
    assert (target_ranks(diverged, make_corpus(table, 3))[0] >= 8).all()
    assert (recommend(diverged, make_corpus(table, 3), k=2)[0] == -1).all()
    table[[0, 1, 4]] = math.nan
    queries = make_queries(queries.vectors, queries.targets, [[]] * 3)
    assert np.sort(recommend(queries, make_corpus(table, 3), k=8)[0]).tolist() == [[-1, -1, -1, 2, 3, 5, 6, 7]] * 3
    assert (recommend(queries, make_corpus(table, 3), k=1)[0] >= 2).all()
    assert (recommend(queries, make_corpus(table), k=5)[0] >= 2).all()  # nan scores take no place


def test_one_query_costs_few_products() -> None:
    table = torch.randn(CHUNK, 4)
    with FlopCounterMode(display=False) as counter:
        recommend(make_queries(table[:1], [0], [[]]), make_corpus(table), k=3)
    assert counter.get_total_flops() <= 16 * 2 * CHUNK * 4


def test_only_the_ids_of_a_corpus_are_ranked_and_other_targets_are_misses() -> None:
    """Ids are any int64. A corpus of some ids ranks as the table of those rows does."""
    queries, table = grid_case(6, 9, seed=4)
    ids = np.sort(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 9))
    row_of = {id_: row for row, id_ in enumerate(ids.tolist())}

    def embed(wanted: Tensor) -> Tensor:
        return table[[row_of[id_] for id_ in wanted.tolist()]]

    by_id = Queries(
        queries.vectors, queries.user_ids, ids[queries.targets], ids[queries.seen_items], queries.seen_lengths
    )
    ranks = target_ranks(by_id, Corpus(embed, torch.from_numpy(ids), EPS, 4))[0]
    np.testing.assert_array_equal(ranks, ranks_by_loop(queries, table))
    positions, _ = recommend(by_id, Corpus(embed, torch.from_numpy(ids), EPS, 4), k=3)
    np.testing.assert_array_equal(positions, recommend(queries, make_corpus(table, 4), k=3)[0])

    without = ids[ids != by_id.targets[0]]
    fewer = target_ranks(by_id, Corpus(embed, torch.from_numpy(without), EPS, 4))[0]
    assert np.isinf(fewer[by_id.targets == by_id.targets[0]]).all()
    others = by_id.targets != by_id.targets[0]
    np.testing.assert_array_equal(np.isfinite(fewer[others]), ~by_id.is_target_seen[others])
    nothing = target_ranks(by_id, Corpus(embed, torch.zeros(0, dtype=torch.int64), EPS, 4))[0]
    assert retrieval_metrics(["HR@500", "NDCG@500", "MRR"], nothing) == {"HR@500": 0, "NDCG@500": 0, "MRR": 0}


def test_items_whose_rows_are_zeros_are_no_candidates() -> None:
    queries, table = grid_case(3, 8, seed=1)
    table[[2, 5]] = 0
    table[3, 0] = 0
    queries = make_queries(queries.vectors, [2, 0, 5], [[]] * 3)
    ranks = target_ranks(queries, make_corpus(table, 3))[0]
    assert np.isinf(ranks[[0, 2]]).all() and 1 <= ranks[1] <= 6
    positions, _ = recommend(queries, make_corpus(table, 3), k=8)
    assert np.sort(positions).tolist() == [[-1, -1, 0, 1, 3, 4, 6, 7]] * 3

"""Evaluation leaves models as they were, ignores padding, and gives the same observations on any number of ranks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hstu.model.outputs import ModelOutput
from hstu.train.corpus import Corpus
from hstu.train.evaluate import Observations, observe_ranking, observe_retrieval, of_ranking
from hstu.train.metrics import retrieval_metrics
from hstu.train.task_metrics import RankingMetrics
from tests.helpers import make_batch
from tests.train.test_corpus import EPS, make_queries, ranks_by_loop


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
        batch.seen = None
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

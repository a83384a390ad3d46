"""Evaluation leaves models as they were, ignores padding, and gives the same observations on any number of ranks."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config.args import RankingArgs, RetrievalArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.data.features.roles import FeatureRoles
from hstu.model.gr_model import GRModel
from hstu.model.stack import ModelOutput
from hstu.parallel.mesh import Heartbeat, Mesh
from hstu.train.batch_source import BatchSource
from hstu.train.corpus import Corpus
from hstu.train.evaluate import RankingEvaluator, RetrievalEvaluator, of_ranking
from hstu.train.metrics import retrieval_metrics
from hstu.train.task_metrics import RankingMetrics
from tests.helpers import make_batch
from tests.train.test_corpus import EPS, make_queries, ranks_by_loop

MESH = cast(Mesh, SimpleNamespace(rank=0, world_size=1, heartbeat=Heartbeat()))
METRICS = ("HR@1", "HR@10", "NDCG@10", "MRR", "HR@500")


class LastItemModel(nn.Module):
    """Its query is the row of a sequence's last item; dropout would make it random."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.dropout = nn.Parameter(table), nn.Dropout(0.5)

    def forward(self, batch: HSTUBatch) -> ModelOutput:
        is_real = torch.from_numpy(batch.item_lengths > 0)
        last = batch.features["item"].values()[np.cumsum(batch.item_lengths)[is_real.numpy()] - 1]
        queries = torch.zeros(batch.batch_size, self.table.shape[1])
        queries[is_real] = F.normalize(self.dropout(self.table)[last], dim=1)
        return ModelOutput(torch.zeros(()), torch.zeros((), dtype=torch.int64), queries=queries)


def retrieval_batches() -> tuple[LastItemModel, list[HSTUBatch], np.ndarray]:
    table = torch.randn((20, 6), generator=torch.Generator().manual_seed(3))
    histories = [[3, 4], [7], [1, 2, 9], [5, 5], [11, 0]]
    targets, seen = [8, 9, 2, 0, 19], [[13, 3, 4], [7], [1, 2, 9], [5, 5], [11, 0]]
    first = make_batch(histories[:3], task="retrieval_eval", labels=targets[:3], seen_lists=seen[:3])
    second = make_batch(
        [*histories[3:], []], task="retrieval_eval", labels=[*targets[3:], -1], seen_lists=[*seen[3:], []]
    )
    queries = make_queries(table[[row[-1] for row in histories]], targets, seen)
    return LastItemModel(table), [first, second], ranks_by_loop(queries, table)


class Retrieval(RetrievalEvaluator):
    """Evaluates a LastItemModel. ``others``: arrays of a second rank, in the order in which they are gathered."""

    def __init__(
        self, model: "LastItemModel", others: Sequence[np.ndarray] = (), embed: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        args = RetrievalArgs(eval_metrics=METRICS)
        super().__init__(cast(GRModel, model), args, cast(BatchSource, None), MESH)
        self.others, self.embed = iter(others), embed or (lambda ids: model.table[ids])

    def corpus(self, ids: np.ndarray | None = None) -> Corpus:
        return Corpus(self.embed, torch.arange(20), EPS, chunk_items=6)

    def forward(self, batch: HSTUBatch) -> ModelOutput:
        return cast(LastItemModel, self.model)(batch)

    def _gather(self, array: np.ndarray) -> np.ndarray:
        return np.concatenate([array, next(self.others, array[:0])])


def test_retrieval_evaluation_ignores_padding_and_leaves_the_model_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model, batches, ranks = retrieval_batches()
    evaluator = Retrieval(model)
    result = evaluator.evaluate(batches)
    assert evaluator.evaluate(batches) == result
    assert caplog.text.count("1 of 5 targets are items that their user had before") == 1, "not at each evaluation"
    assert result == retrieval_metrics(list(result), ranks)
    assert result["HR@500"] == 0.8  # K beyond the corpus; one target of five is an item that its user had before
    assert model.training and model.table.requires_grad


def test_without_seen_items_nothing_is_filtered() -> None:
    model, batches, ranks = retrieval_batches()
    for batch in batches:
        batch.seen = None
    unfiltered = Retrieval(model).observe(batches).results
    assert np.isfinite(unfiltered).all() and (unfiltered != ranks).all()  # the last item itself ranks first


def test_retrieval_over_two_ranks_equals_one_process() -> None:
    model, batches, _ = retrieval_batches()
    second = list(vars(Retrieval(model).observe(batches[1:])).values())
    both, alone = Retrieval(model, second).observe(batches[:1]), Retrieval(model).observe(batches)
    for name in ("users", "items", "history", "results", "labels"):
        np.testing.assert_array_equal(getattr(both, name), getattr(alone, name))
    assert alone.history.tolist() == [2, 1, 3, 2, 2] and alone.items.tolist() == [8, 9, 2, 0, 19]


def test_a_rank_with_padding_only_still_takes_part_in_every_lookup() -> None:
    model, batches, _ = retrieval_batches()
    calls: list[int] = []

    def embed(ids: Tensor) -> Tensor:
        calls.append(len(ids))
        return model.table[ids]

    for rank_batches in (batches, [make_batch([[], []], task="retrieval_eval", labels=[-1, -1])]):
        Retrieval(model, embed=embed).observe(rank_batches)
    assert calls[: len(calls) // 2] == calls[len(calls) // 2 :] == [6] * 8


class RatingModel(nn.Module):
    """Logits of the classes 1 … 5: the item's id is where the mass is."""

    roles = FeatureRoles("item", "action", ())

    def forward(self, batch: HSTUBatch) -> ModelOutput:
        logits = F.one_hot(batch.features["item"].values(), 5).float()
        return ModelOutput(torch.zeros(()), batch.num_labels.sum(), logits=logits)


class Ranking(RankingEvaluator):
    def __init__(self) -> None:
        args = RankingArgs(prediction_head_arch=[5])
        super().__init__(cast(GRModel, RatingModel()), args, 1, MESH)

    def forward(self, batch: HSTUBatch) -> ModelOutput:
        return cast(RatingModel, self.model)(batch)

    def _gather(self, array: np.ndarray) -> np.ndarray:
        return array


def test_ranking_evaluation_attributes_labels_to_users() -> None:
    batch = make_batch([[0, 4, 2], [3, 1], []], [[1, 5, 2], [1, 4], []])
    metrics = RankingMetrics(("GAUC", "ACC", "AUC>=4"), num_tasks=None, label_offset=1)
    evaluator = Ranking()
    found = evaluator.observe([batch, make_batch([[], []], [[], []])])
    metrics.update(found.results, found.labels, found.users)
    result = metrics.compute()
    assert found.items.tolist() == [0, 4, 2, 3, 1] and found.history.tolist() == [0, 1, 2, 0, 1]
    candidates = make_batch([[0, 4, 2], [3, 1]], [[1, 5, 2], [1, 4]], num_candidates=[2, 1])
    assert evaluator.observe([]).results.shape == (0, 1)
    found = of_ranking(candidates, "item", np.zeros((3, 5)), candidates.labels.numpy(), np.array([7, 8]))
    assert (found.items.tolist(), found.history.tolist()) == ([4, 2, 1], [1, 1, 1])
    assert (found.labels.tolist(), found.requests.tolist()) == ([5, 2, 4], [7, 7, 8])
    assert result["ACC"] == 2 / 5
    # P(rating >= 4) is high for items 3 and 4; the ratings >= 4 belong to items 4 and 1.
    assert result["AUC>=4"] == pytest.approx((2.5 + 1) / 6)
    alone = RankingMetrics(("GAUC",), num_tasks=None, label_offset=1)
    alone.update(np.eye(5, dtype=np.float32)[[0, 4, 2, 3, 1]], np.array([1, 5, 2, 1, 4]), np.array([0, 0, 0, 1, 1]))
    assert result["GAUC"] == alone.compute()["GAUC"]

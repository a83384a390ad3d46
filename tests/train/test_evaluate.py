"""Evaluation leaves models as they were and ignores padding. Of several ranks: tests/distributed/test_evaluation.py."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config.args import RankingArgs, RetrievalArgs
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.features.roles import FeatureRoles
from hstu.model.gr_model import GRModel
from hstu.model.stack import ModelOutput
from hstu.parallel.mesh import Heartbeat, Mesh
from hstu.train.batch_source import BatchSource
from hstu.train.corpus import Corpus
from hstu.train.evaluate import RankingEvaluator, RetrievalEvaluator, of_ranking
from hstu.train.metrics import retrieval_metrics
from hstu.train.task_metrics import ranking_metrics
from tests.helpers import make_batch
from tests.train.test_corpus import EPS, make_queries, ranks_by_loop

MESH = cast(Mesh, SimpleNamespace(rank=0, world_size=1, heartbeat=Heartbeat()))
METRICS = ("HR@1", "HR@10", "NDCG@10", "MRR", "HR@500")


def config_of(args: RankingArgs | RetrievalArgs) -> RunConfig:
    return cast(RunConfig, SimpleNamespace(task_args=args, trainer=SimpleNamespace(max_eval_iters=None)))


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
        return ModelOutput(torch.zeros(()), queries=queries)


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
    """Evaluates a LastItemModel."""

    def __init__(self, model: "LastItemModel") -> None:
        source = cast(BatchSource, SimpleNamespace(newcomers={}))
        super().__init__(config_of(RetrievalArgs(eval_metrics=METRICS)), cast(GRModel, model), MESH, source)

    def corpus(self, ids: np.ndarray | None = None) -> Corpus:
        return Corpus(lambda ids: cast(LastItemModel, self.model).table[ids], torch.arange(20), EPS, chunk_items=6)

    def forward(self, batch: HSTUBatch) -> ModelOutput:
        return cast(LastItemModel, self.model)(batch)


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
    found = Retrieval(model).observe(batches)
    assert np.isfinite(found.results).all() and (found.results[:, 0] != ranks).all()  # the last item itself ranks first
    assert found.history.tolist() == [2, 1, 3, 2, 2] and found.items.tolist() == [8, 9, 2, 0, 19]


def test_a_rank_without_users_takes_part_with_none() -> None:
    model, batches, _ = retrieval_batches()
    found = Retrieval(model).observe([make_batch([[]], task="retrieval_eval", labels=[-1], seen_lists=[[]])])
    assert found.results.shape == (0, Retrieval(model).observe(batches).results.shape[1]) and not len(found.items)


class RatingModel(nn.Module):
    """Logits of the classes 1 … 5: the item's id is where the mass is."""

    roles = FeatureRoles("item", "action", ())

    def forward(self, batch: HSTUBatch) -> ModelOutput:
        logits = F.one_hot(batch.features["item"].values(), 5).float()
        return ModelOutput(torch.zeros(()), logits=logits)


class Ranking(RankingEvaluator):
    def __init__(self) -> None:
        super().__init__(config_of(RankingArgs(prediction_head_arch=[5])), cast(GRModel, RatingModel()), MESH)

    def forward(self, batch: HSTUBatch) -> ModelOutput:
        return cast(RatingModel, self.model)(batch)


def test_ranking_evaluation_attributes_labels_to_users() -> None:
    batch = make_batch([[0, 4, 2], [3, 1], []], [[1, 5, 2], [1, 4], []])
    evaluator = Ranking()
    found = evaluator.observe([batch, make_batch([[], []], [[], []])])
    rows = found.results, found.labels, found.users
    result = ranking_metrics(("GAUC", "ACC", "AUC>=4"), *rows, num_tasks=None, label_offset=1)
    assert found.items.tolist() == [0, 4, 2, 3, 1] and found.history.tolist() == [0, 1, 2, 0, 1]
    candidates = make_batch([[0, 4, 2], [3, 1]], [[1, 5, 2], [1, 4]], num_candidates=[2, 1])
    assert evaluator.observe([]).results.shape == (0, 1)
    found = of_ranking(candidates, "item", np.zeros((3, 5)), candidates.labels.numpy(), np.array([7, 8]))
    assert (found.items.tolist(), found.history.tolist()) == ([4, 2, 1], [1, 1, 1])
    assert (found.labels.tolist(), found.requests.tolist()) == ([5, 2, 4], [7, 7, 8])
    assert result["ACC"] == 2 / 5
    # P(rating >= 4) is high for items 3 and 4; the ratings >= 4 belong to items 4 and 1.
    assert result["AUC>=4"] == pytest.approx((2.5 + 1) / 6)
    rows = np.eye(5, dtype=np.float32)[[0, 4, 2, 3, 1]], np.array([1, 5, 2, 1, 4]), np.array([0, 0, 0, 1, 1])
    assert result["GAUC"] == ranking_metrics(("GAUC",), *rows, num_tasks=None, label_offset=1)["GAUC"]

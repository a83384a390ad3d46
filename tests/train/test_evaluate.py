"""Evaluation leaves models as they were and ignores padding; the last and the best of each metric.

Of several ranks: tests/distributed/test_evaluation.py.
"""

import json
import math
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
from hstu.observe.records import EvalRecord
from hstu.parallel.mesh import Heartbeat, Mesh
from hstu.train.batch_source import BatchSource
from hstu.train.corpus import Corpus
from hstu.train.evaluate import RankingEvaluator, RetrievalEvaluator, of_ranking
from hstu.train.history import MetricsHistory, RunningLoss, Selection
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


def record(iteration: int, split: str = "valid", **metrics: float) -> EvalRecord:
    return EvalRecord(iteration=iteration, epoch=iteration / 10, split=split, metrics=metrics)


@pytest.mark.parametrize(
    ("name", "best"),
    [
        *((name, 0.1) for name in ("LOGLOSS", "NE", "NE/task0")),
        *((name, 0.2) for name in ("AUC", "AUC>=4", "AUC/task1", "HR@10", "NDCG@10", "MRR", "ACC", "GAUC")),
    ],
)
def test_losses_are_better_when_lower_and_all_else_when_higher(name: str, best: float) -> None:
    history = MetricsHistory()
    for iteration, value in enumerate((0.2, 0.1, 0.2, 0.1), 1):
        history.add(record(iteration, "valid", **{name: value}))
    assert history.best["valid"][name] == {"value": best, "iter": 1 if best == 0.2 else 2}, "the first that reached it"


def test_each_metric_has_a_best_of_its_own_in_each_split() -> None:
    history = MetricsHistory()
    for entry in (
        record(10, AUC=0.6, LOGLOSS=0.5),
        record(20, AUC=0.7, LOGLOSS=0.6),
        record(20, "test", AUC=0.9),
        record(30, AUC=0.65, LOGLOSS=0.7),
    ):
        history.add(entry)
    assert history.last == {"valid": {"AUC": 0.65, "LOGLOSS": 0.7}, "test": {"AUC": 0.9}}
    assert history.best == {
        "valid": {"AUC": {"value": 0.7, "iter": 20}, "LOGLOSS": {"value": 0.5, "iter": 10}},
        "test": {"AUC": {"value": 0.9, "iter": 20}},
    }


def test_a_metric_that_was_undefined_first_gets_its_best_later() -> None:
    history = MetricsHistory()
    history.add(record(10, AUC=math.nan))
    history.add(record(20, AUC=0.4))
    assert history.best["valid"]["AUC"] == {"value": 0.4, "iter": 20}


def follow(values: list[float], mode: str = "max", patience: int | None = 2) -> tuple[list[bool], Selection]:
    """Whether each of the values, evaluated at 10, 20, …, was the best by then; and the selection in the end."""
    history, selection = MetricsHistory(), Selection("AUC", mode, "valid", patience)
    improved = []
    for iteration, value in enumerate(values, 1):
        history.add(record(10 * iteration, AUC=value))
        history.add(record(10 * iteration, "test", AUC=1.0))  # another split has no say
        improved.append(selection.follow(history))
    return improved, selection


def test_patience_counts_evaluations_in_a_row_that_do_not_beat_the_best() -> None:
    improved, selection = follow([0.5, 0.6, 0.6, 0.7, 0.6])
    assert improved == [True, True, False, True, False]
    assert (selection.value, selection.iteration, selection.without_improvement) == (0.7, 40, 1)
    assert not selection.is_exhausted
    assert follow([0.5, 0.6, 0.6, 0.7, 0.6, 0.5])[1].is_exhausted
    assert not follow([0.5, 0.4, 0.3, 0.2], patience=None)[1].is_exhausted


def test_the_mode_says_what_is_better_and_nan_never_is() -> None:
    assert follow([0.5, 0.6, 0.4], mode="min")[0] == [True, False, True]
    improved, selection = follow([math.nan, 0.5, math.nan])
    assert improved == [False, True, False]
    assert selection.iteration == 20
    assert follow([math.nan, math.nan])[1].is_exhausted, "a model that diverged from the start"


def test_the_running_mean_goes_on_in_another_process() -> None:
    before, after, older = (RunningLoss(torch.device("cpu"), ["click", "like"]) for _ in range(3))
    for loss in (1 / 3, 1e-9):
        before.add(torch.tensor([loss, 2 * loss / 3, loss / 3]))
    stored = json.loads(json.dumps(before.state_dict()))
    after.load_state_dict(stored)
    older.load_state_dict({"sum": stored["sum"], "steps": 2})
    for one in (before, after, older):
        one.add(torch.tensor([0.7, 0.4, 0.3]))
    mean, parts = before.pop()
    assert after.pop() == (mean, parts) and after.steps == 0 and sum(parts.values()) == pytest.approx(mean)
    assert older.state_dict()["sum"] / 3 == mean and all(math.isnan(part) for part in older.pop()[1].values())
    older.add(torch.tensor([0.75, 0.5, 0.25]))
    assert older.pop() == (0.75, {"click": 0.5, "like": 0.25}), "known from the first record on"

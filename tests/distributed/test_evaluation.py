"""Three ranks, one of them without rows, evaluate as one process does, and receive their share of what there is."""

import re
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hstu.train.corpus as corpus_module
from hstu.config.args.task import METRICS_OF_KIND
from hstu.parallel.exchange import ALONE, Exchange
from hstu.parallel.mesh import Mesh
from hstu.train import evaluate
from hstu.train.corpus import Corpus, Queries, recommend, target_ranks
from hstu.train.evaluate import Evaluator, Observations
from hstu.train.task_metrics import TaskMetrics
from tests.distributed.launch import Launch, run_cases
from tests.train.test_corpus import EPS, grid_case
from tests.train.test_evaluate import MESH

RANKS, CLASSES, ROWS = 3, 4, 3000
SHAPES = [(7, 23, 5), (40, 200, 3), (60, 61, 70), (30, 12, 4), (1, 2, 1), (0, 5, 2)]
"""Queries, items and items per chunk. Without fewer queries than items, the items are sent."""
COLLECTIVES = ("all_gather_into_tensor", "all_to_all_single", "reduce_scatter_tensor", "all_reduce")


def own_rows(count: int, exchange: Exchange) -> np.ndarray:
    """Rank 1 has none, and rank 0 has twice as many as rank 2."""
    rows = np.arange(count)
    return rows if exchange is ALONE else rows[(rows % 3 == 0) * 2 == exchange.rank if exchange.rank else rows % 3 != 0]


def retrieved(mesh: Mesh, shape: tuple[int, int, int]) -> dict[str, list[Any]]:
    """Of the queries of this rank: numbers, ranks, and best items with their scores."""
    exchange, (num_queries, num_items, chunk_items) = Exchange.of(mesh), shape
    every, table = grid_case(num_queries, num_items, seed=num_items)
    table[::7] = 0
    own = own_rows(num_queries, exchange)
    seen = np.split(every.seen_items, np.cumsum(every.seen_lengths))
    queries = Queries(
        every.vectors[own],
        own,
        every.targets[own],
        np.concatenate([every.seen_items[:0], *(seen[row] for row in own)]),
        every.seen_lengths[own],
    )

    def embed(ids: Tensor) -> Tensor:
        exchange.total(0)  # a collective: every rank must embed equally often
        return table[ids]

    corpus = Corpus(embed, torch.arange(num_items), EPS, chunk_items)
    small: dict[str, Any] = {"ROUND_QUERIES": 24, "PART_CHUNKS": 2, "BLOCK_QUERIES": 8, "CPU_PRODUCT_ITEMS": 3}
    with mock.patch.multiple(corpus_module, **small):
        ranks, scores = target_ranks(queries, corpus, exchange)
        items, of_items = recommend(queries, corpus, 6, exchange)
    return {
        name: each.tolist()
        for name, each in locals().items()
        if name in ("own", "ranks", "scores", "items", "of_items")
    }


def measured(mesh: Mesh, kind: str, case: str) -> dict[str, float]:
    exchange, rng = Exchange.of(mesh), np.random.default_rng(0)
    users, width = rng.integers(0, 99, ROWS), (CLASSES,) if kind == "class" else ()
    predictions, labels = (
        rng.normal(size=(ROWS, *width)).round(1),
        rng.integers(0, 2 if kind == "binary" else CLASSES, ROWS),
    )
    predictions *= case != "constant"
    labels = np.where(rng.random(ROWS) < 0.1, np.nan, labels * (case != "one class"))
    names = [re.sub("K$", "2", name) for name in METRICS_OF_KIND[kind]]
    own = own_rows(ROWS, exchange)
    rows = predictions, labels, users, users * 7 + rng.integers(0, 7, ROWS)
    owned = exchange.to_owners(users[own] % 2, *(each[own] for each in rows))
    return TaskMetrics(names, kind, exchange=exchange).compute(*owned)


class Rows(Evaluator):
    """Measures given observations."""

    def __init__(self, mesh: Mesh) -> None:
        self.exchange = Exchange.of(mesh)

    def observe(self, batches: Any) -> Observations:
        raise NotImplementedError

    def metrics(self, observations: Observations, exchange: Exchange = ALONE) -> dict[str, float]:
        metrics = TaskMetrics(["AUC", "GAUC", "LOGLOSS"], "binary", exchange=exchange)
        return metrics.compute(observations.results, observations.labels, observations.users, observations.requests)


def received(mesh: Mesh, count: int, gathered_rows: int) -> dict[str, Any]:
    """Bytes that this rank receives for ``count`` predictions, by collective, and the metrics."""
    rng = np.random.default_rng(1)
    found = {name: 0 for name in COLLECTIVES}

    def counting(name: str) -> Any:
        function = getattr(dist, name)

        def counted(output: Tensor, *args: Any, **kwargs: Any) -> Any:
            found[name] += output.nbytes
            return function(output, *args, **kwargs)

        return counted

    users, scores, labels = rng.integers(0, 400, count), rng.normal(size=count), rng.integers(0, 2, count)
    rows = Observations(users, users, users, users, scores.astype(np.float32), labels, users).select(
        np.arange(mesh.rank, count, mesh.world_size)
    )
    patches = {name: counting(name) for name in COLLECTIVES}
    with mock.patch.multiple(dist, **patches), mock.patch.object(evaluate, "GATHERED_ROWS", gathered_rows):
        metrics = Rows(mesh).metrics_of_all(rows)
    return {"bytes": found, "metrics": metrics}


CASES: dict[str, Any] = {
    **{f"retrieval {shape}": partial(retrieved, shape=shape) for shape in SHAPES},
    **{
        f"{kind} {case}": partial(measured, kind=kind, case=case)
        for kind in METRICS_OF_KIND
        for case in ("random", "constant", "one class")
    },
    "gathered": partial(received, count=ROWS, gathered_rows=ROWS),
    "exchanged": partial(received, count=ROWS, gathered_rows=0),
    "twice as many": partial(received, count=2 * ROWS, gathered_rows=0),
}


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of one process, and of each of three ranks."""
    return {name: case(MESH) for name, case in CASES.items()}, run_cases(Launch(RANKS, timeout_s=120), CASES)


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_and_best_items_are_those_of_one_process(found: Any, shape: tuple[int, int, int]) -> None:
    alone, by_rank = (found[0][name := f"retrieval {shape}"], [each[name] for each in found[1]])
    order = np.argsort([row for each in by_rank for row in each["own"]])
    for name, expected in alone.items():
        values = [row for each in by_rank for row in each[name]]
        assert [values[place] for place in order] == expected, name


@pytest.mark.parametrize("case", ["random", "constant", "one class"])
@pytest.mark.parametrize("kind", METRICS_OF_KIND)
def test_metrics_of_divided_rows_are_those_of_one_process(found: Any, kind: str, case: str) -> None:
    alone, by_rank = found[0][name := f"{kind} {case}"], [each[name] for each in found[1]]
    for rank in by_rank:
        assert rank == pytest.approx(alone, rel=1e-12, nan_ok=True)
        for exact in {"AUC", "ACC"} & alone.keys():
            assert rank[exact] == alone[exact] or np.isnan(alone[exact])


def test_a_rank_receives_its_share_of_the_predictions(found: Any) -> None:
    alone, by_rank = found
    for rank in by_rank:
        assert rank["gathered"]["metrics"] == pytest.approx(alone["gathered"]["metrics"], rel=1e-12)
        assert rank["exchanged"]["metrics"] == pytest.approx(alone["gathered"]["metrics"], rel=1e-12)
        once, twice = (sum(rank[name]["bytes"].values()) for name in ("exchanged", "twice as many"))
        # 44 bytes per prediction of the rank's users, and 24 per distinct score of its range
        assert (twice - once) / ROWS < 1.25 * (44 + 24) / RANKS

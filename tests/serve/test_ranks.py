"""Two ranks give what one gives: metrics, predictions of both tasks, and vectors."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.data.sampling.splits import Period, Split
from hstu.parallel.mesh import Mesh
from hstu.serve.command import Candidates
from hstu.serve.loaded import LoadedModel
from hstu.serve.predict import RankingPredictor, RetrievalPredictor, evaluate_split, user_vectors
from tests.distributed.launch import run_cases
from tests.train.tiny import ITEMS, FinishedRun, walks

USERS = np.array([3, 17, 0, 8, 9, 12, 4])
PERIOD = Period(1_000_120, 1_000_360)
CANDIDATES = Candidates(USERS, np.full(7, ITEMS), np.tile(np.arange(ITEMS), 7), {})


def metrics(mesh: Mesh, path: Path, split: Split | Period) -> Any:
    found = evaluate_split(LoadedModel.load(path, mesh=mesh), split)
    return found.metrics() | {f"half {name}": half for name, half in found.half_widths().items()}


def rows_of_period(mesh: Mesh, path: Path) -> dict[tuple[int, int], int]:
    """(user, time) → item of the labels of a period, on the main rank."""
    model = LoadedModel.load(path, mesh=mesh)
    rows = evaluate_split(model, PERIOD).rows(model).to_pydict()
    return dict(zip(zip(rows["user"], rows["time"], strict=True), rows["item"], strict=True))


def predictions(mesh: Mesh, retrieval: Path, ranking: Path) -> Any:
    model = LoadedModel.load(retrieval, mesh=mesh)
    best = RetrievalPredictor(model, 3)
    scored = RankingPredictor(LoadedModel.load(ranking, mesh=mesh), CANDIDATES)
    tables = {"best": best.predict(USERS), "scored": scored.predict(USERS)}
    vectors = np.concatenate(list(user_vectors(model, USERS))).tolist()
    return {"vectors": {"user": USERS.tolist(), "vector": vectors}} | {
        name: table.to_pydict() for name, table in tables.items()
    }


@pytest.fixture(scope="module")
def found(finished: Callable[[str], FinishedRun], mesh: Mesh) -> list[dict[str, Any]]:
    """Of one rank, and of each of two."""
    retrieval, ranking = (finished(name).path for name in ("retrieval", "ranking"))
    cases = {
        "retrieval": partial(metrics, path=retrieval, split="test"),
        "ranking": partial(metrics, path=ranking, split="valid"),
        "period": partial(metrics, path=ranking, split=PERIOD),
        "drawn": partial(metrics, path=retrieval, split=replace(PERIOD, most=20)),
        "rows": partial(rows_of_period, path=ranking),
        "predictions": partial(predictions, retrieval=retrieval, ranking=ranking),
    }
    return [{name: case(mesh) for name, case in cases.items()}, *run_cases(2, cases)]


def test_metrics_do_not_depend_on_the_ranks(found: list[dict[str, Any]]) -> None:
    one, *of_ranks = found
    for rank in of_ranks:
        for task in ("retrieval", "ranking", "period", "drawn"):
            assert rank[task] == pytest.approx(one[task], nan_ok=True, rel=1e-6)


def test_the_labels_of_a_period_are_its_events(found: list[dict[str, Any]]) -> None:
    expected = {
        (100 + user, 1_000_000 + 60 * place): 1000 + item
        for user, items in enumerate(walks()["items"])
        for place, item in enumerate(items[:6])
        if place >= 2
    }
    assert [each["rows"] for each in found[:2]] == [expected, expected] and not found[2]["rows"]


def test_predictions_do_not_depend_on_the_ranks(found: list[dict[str, Any]]) -> None:
    one, *of_ranks = found
    for name, expected in one["predictions"].items():
        assert len(expected["user"]) == {"best": 18, "scored": 7 * ITEMS, "vectors": 7}[name]
        for rank in of_ranks:
            actual = rank["predictions"][name]
            assert list(actual) == list(expected)
            for column, values in expected.items():
                np.testing.assert_allclose(actual[column], values, rtol=1e-5, atol=1e-6)

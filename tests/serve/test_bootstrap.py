"""Intervals of the bootstrap against distributions that are known."""

import numpy as np
import pytest

from hstu.parallel.mesh import Mesh
from hstu.serve.evaluation import ByUser, Resampling
from hstu.train.evaluate import Observations
from hstu.train.metrics import retrieval_metrics
from hstu.train.task_metrics import RankingMetrics, TaskMetrics


def observed(users: np.ndarray, results: np.ndarray, labels: np.ndarray) -> Observations:
    numbers = np.arange(len(users))
    return Observations(users, numbers, numbers, users, results, labels)


def test_the_interval_of_a_hit_rate_is_that_of_a_binomial_distribution(mesh: Mesh) -> None:
    users = np.random.default_rng(1).permutation(2000)
    ranks = np.where(users < 600, 1.0, 99.0)
    by_user = ByUser(observed(users, ranks, users))
    resampling = Resampling(mesh, 2000, confidence=0.9, seed=3)
    low, high = resampling.intervals(
        lambda drawn: retrieval_metrics(["HR@1"], by_user.draw(drawn).results), len(by_user.users)
    )["HR@1"]
    half = 1.645 * np.sqrt(0.3 * 0.7 / 2000)
    assert (low, high) == (pytest.approx(0.3 - half, abs=0.0015), pytest.approx(0.3 + half, abs=0.0015))


def test_predictions_of_one_user_are_drawn_together(mesh: Mesh) -> None:
    once = observed(np.arange(100), np.arange(100) % 4 + 1.0, np.arange(100))
    thrice = once.select(np.repeat(np.arange(100), 3))
    found = []
    for observations in (once, thrice):
        by_user = ByUser(observations)
        assert len(by_user.users) == 100

        def statistic(drawn: np.ndarray, by_user: ByUser = by_user) -> dict[str, float]:
            return retrieval_metrics(["MRR"], by_user.draw(drawn).results)

        found.append(Resampling(mesh, 50).intervals(statistic, 100)["MRR"])
    assert found[0] == pytest.approx(found[1]) and found[0][0] < found[0][1]


def test_a_user_who_is_drawn_twice_counts_twice_and_changes_no_order() -> None:
    rng = np.random.default_rng(2)
    users = np.sort(rng.integers(0, 9, 60))
    observations = observed(users, rng.normal(size=(60, 1)), rng.integers(0, 2, 60))
    everyone = np.arange(len(np.unique(users)))
    for repeats in (1, 2):
        drawn = ByUser(observations).draw(np.repeat(everyone, repeats))
        assert len(drawn) == 60 * repeats
        ranking = RankingMetrics(("AUC", "GAUC", "LOGLOSS"), num_tasks=1)
        ranking.update(drawn.results, drawn.labels, drawn.users)
        task = TaskMetrics(("NDCG",), "binary")
        task.update(drawn.results[:, 0], drawn.labels.astype(float), drawn.users, drawn.requests)
        metrics = {**ranking.compute(), **task.compute()}
        if repeats == 1:
            expected = metrics
    assert metrics == pytest.approx(expected)


def test_nothing_is_learnt_from_one_user_or_without_resamples(mesh: Mesh) -> None:
    assert Resampling(mesh, 10).intervals(lambda _: {"AUC": 1.0}, 1) == {}
    assert Resampling(mesh, 0).intervals(lambda _: {"AUC": 1.0}, 9) == {}
    assert np.isnan(Resampling(mesh, 10).intervals(lambda _: {"AUC": float("nan")}, 9)["AUC"]).all()

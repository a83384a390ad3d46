"""Metrics against scikit-learn and against loops; ties, undefined cases, several batches."""

import math

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from hstu.train.metrics import auc, retrieval_metrics
from hstu.train.task_metrics import RankingMetrics

ALL = ("AUC", "GAUC", "ACC", "LOGLOSS", "NE")


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def predictions(num: int, width: int, high: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, on a coarse grid if ``ties``; actions in [0, high); a dozen users."""
    rng = np.random.default_rng(0)
    logits = rng.integers(-4, 5, (num, width)) / 2 if ties else rng.normal(size=(num, width))
    return logits.astype(np.float32), rng.integers(0, high, num), rng.integers(0, 12, num)


def test_auc_equals_scikit_learn_on_many_tied_scores() -> None:
    rng = np.random.default_rng(1)
    scores, positive = rng.integers(0, 500, 20_000) / 7.0, rng.random(20_000) < 0.2
    assert auc(scores, positive) == pytest.approx(sklearn_metrics.roc_auc_score(positive, scores), abs=1e-12)


def test_task_metrics_equal_scikit_learn() -> None:
    logits, actions, users = predictions(3000, width=3, high=8, ties=True)
    collected = RankingMetrics(ALL, num_tasks=3)
    for part in np.array_split(np.arange(3000), 4):
        collected.update(logits[part], actions[part], users[part])
    result = collected.compute()

    bits = actions[:, None] >> np.arange(3) & 1
    probabilities = 1 / (1 + np.exp(-logits.astype(float)))
    areas = [sklearn_metrics.roc_auc_score(bits[:, t], probabilities[:, t]) for t in range(3)]
    losses = [sklearn_metrics.log_loss(bits[:, t], probabilities[:, t]) for t in range(3)]
    bases = [sklearn_metrics.log_loss(bits[:, t], np.full(3000, bits[:, t].mean())) for t in range(3)]
    assert [result[f"AUC/task{t}"] for t in range(3)] == pytest.approx(areas)
    assert result["AUC"] == pytest.approx(np.mean(areas))
    assert result["LOGLOSS"] == pytest.approx(np.mean(losses))
    assert result["NE"] == pytest.approx(np.mean(np.divide(losses, bases)))
    assert result["ACC"] == pytest.approx(np.mean((probabilities > 0.5) == bits))
    assert 0.4 < result["GAUC"] < 0.6


def test_class_metrics_equal_scikit_learn() -> None:
    logits, ratings, users = predictions(3000, width=5, high=5)
    ratings += 1
    collected = RankingMetrics((*ALL, "AUC>=4", "AUC>=2"), num_tasks=None, label_offset=1)
    collected.update(logits, ratings, users)
    result = collected.compute()

    probabilities = softmax(logits.astype(float))
    rates = np.bincount(ratings - 1) / 3000
    assert result["AUC"] == pytest.approx(
        sklearn_metrics.roc_auc_score(ratings, probabilities, multi_class="ovr", average="macro")
    )
    assert result["AUC>=4"] == pytest.approx(sklearn_metrics.roc_auc_score(ratings >= 4, probabilities[:, 3:].sum(1)))
    assert result["AUC>=2"] == pytest.approx(sklearn_metrics.roc_auc_score(ratings >= 2, probabilities[:, 1:].sum(1)))
    assert result["LOGLOSS"] == pytest.approx(sklearn_metrics.log_loss(ratings, probabilities))
    assert result["NE"] == pytest.approx(result["LOGLOSS"] / -(rates * np.log(rates)).sum())
    assert result["ACC"] == pytest.approx(np.mean(logits.argmax(1) + 1 == ratings))


def test_retrieval_metrics_by_hand() -> None:
    result = retrieval_metrics(["HR@1", "HR@10", "NDCG@10", "MRR", "MRR@2"], np.array([1.0, 3.0, 10.5, 2.0]))
    assert result["HR@1"] == 1 / 4
    assert result["HR@10"] == 3 / 4  # a tie across the cut stands in its middle, beyond it
    assert result["NDCG@10"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(3)) / 4)
    assert result["MRR"] == pytest.approx((1 + 1 / 3 + 1 / 10.5 + 1 / 2) / 4)
    assert result["MRR@2"] == pytest.approx((1 + 1 / 2) / 4)

"""Metrics against scikit-learn and against loops; ties, undefined cases, several batches."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from hstu.train.metrics import auc, auc_by_group, grouped_auc, retrieval_metrics
from hstu.train.task_metrics import RankingMetrics

ALL = ("AUC", "GAUC", "ACC", "LOGLOSS", "NE")


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def predictions(num, width, high, ties=False):
    """Logits, on a coarse grid if ``ties``; actions in [0, high); a dozen users."""
    rng = np.random.default_rng(0)
    logits = rng.integers(-4, 5, (num, width)) / 2 if ties else rng.normal(size=(num, width))
    return logits.astype(np.float32), rng.integers(0, high, num), rng.integers(0, 12, num)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3)), min_size=1, max_size=40))
def test_auc_counts_pairs_and_ties_as_half_in_each_group(rows):
    scores, positive, groups = (np.array(column) for column in zip(*rows, strict=True))
    expected = []
    for group in np.unique(groups):
        own = [(s, p) for s, p, g in rows if g == group]
        pairs = [(a > b) + 0.5 * (a == b) for (a, p), (b, q) in itertools.product(own, own) if p and not q]
        expected.append(np.mean(pairs) if pairs else math.nan)
    np.testing.assert_allclose(auc_by_group(scores.astype(float), positive, groups), expected, equal_nan=True)


def test_auc_equals_scikit_learn_on_many_tied_scores():
    rng = np.random.default_rng(1)
    scores, positive = rng.integers(0, 500, 20_000) / 7.0, rng.random(20_000) < 0.2
    assert auc(scores, positive) == pytest.approx(sklearn_metrics.roc_auc_score(positive, scores), abs=1e-12)


def test_gauc_weighs_users_by_impressions_and_skips_those_of_one_class():
    scores = np.array([0.9, 0.1, 0.8, 0.2, 0.3, 0.5])
    positive = np.array([True, False, False, True, False, True])
    users = np.array([7, 7, 5, 5, 5, 9])
    # User 7: AUC 1 over 2 impressions; user 5: AUC 0 over 3 impressions; user 9 has no negative.
    assert grouped_auc(scores, positive, users) == pytest.approx((1 * 2 + 0 * 3) / 5)


def test_task_metrics_equal_scikit_learn():
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


def test_class_metrics_equal_scikit_learn():
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


def test_metrics_do_not_depend_on_the_batches():
    logits, actions, users = predictions(400, width=2, high=4, ties=True)
    whole, parts = RankingMetrics(ALL, num_tasks=2), RankingMetrics(ALL, num_tasks=2)
    whole.update(logits, actions, users)
    for rows in (slice(150), slice(150, 150), slice(150, None)):
        parts.update(logits[rows], actions[rows], users[rows])
    assert parts.compute() == whole.compute()


def test_one_class_only_gives_nan_and_says_why(caplog):
    collected = RankingMetrics(("AUC", "NE", "ACC"), num_tasks=1)
    collected.update(np.array([[0.3], [0.5]]), np.array([1, 1]), np.array([0, 1]))
    result = collected.compute()
    assert math.isnan(result["AUC"]) and math.isnan(result["NE"])
    assert result["ACC"] == 1.0
    assert "AUC is undefined (nan)" in caplog.text


@pytest.mark.parametrize("empty_batch", [True, False])
def test_no_label_at_all_gives_nan_and_says_why(empty_batch, caplog):
    collected = RankingMetrics(("AUC", "LOGLOSS"), num_tasks=1)
    if empty_batch:
        collected.update(np.zeros((0, 1)), np.zeros(0), np.zeros(0))
    assert all(math.isnan(value) for value in collected.compute().values())
    assert "the evaluation set has no" in caplog.text


def test_a_model_that_diverged_has_no_metrics(caplog):
    collected = RankingMetrics(("AUC",), num_tasks=1)
    collected.update(np.array([[0.3], [math.nan]]), np.array([1, 0]), np.array([0, 1]))
    assert math.isnan(collected.compute()["AUC"])
    assert "not finite" in caplog.text


def test_labels_without_a_class_are_refused():
    collected = RankingMetrics(("ACC",), num_tasks=None, label_offset=1)
    collected.update(np.zeros((2, 5)), np.array([0, 5]), np.zeros(2))
    with pytest.raises(ValueError, match="classes -1 … 4"):
        collected.compute()


def test_retrieval_metrics_by_hand():
    result = retrieval_metrics(["HR@1", "HR@10", "NDCG@10", "MRR", "MRR@2"], np.array([1.0, 3.0, 10.5, 2.0]))
    assert result["HR@1"] == 1 / 4
    assert result["HR@10"] == 3 / 4  # a tie across the cut stands in its middle, beyond it
    assert result["NDCG@10"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(3)) / 4)
    assert result["MRR"] == pytest.approx((1 + 1 / 3 + 1 / 10.5 + 1 / 2) / 4)
    assert result["MRR@2"] == pytest.approx((1 + 1 / 2) / 4)

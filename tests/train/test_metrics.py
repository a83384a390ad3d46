"""Metrics of tasks against scikit-learn and against loops over pairs and requests; metrics of retrieval by hand."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from hstu.config.args.task import METRICS_OF_KIND, fits_kind
from hstu.train.metrics import ROUNDING, half_widths, retrieval_metrics, without_rounding
from hstu.train.task_metrics import TaskMetrics, ranking_metrics

ALL = ("AUC", "GAUC", "ACC", "LOGLOSS", "NE")


def predictions(num: int, width: int, high: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, on a coarse grid if ``ties``; actions in [0, high); a dozen users."""
    rng = np.random.default_rng(0)
    logits = rng.integers(-4, 5, (num, width)) / 2 if ties else rng.normal(size=(num, width))
    return logits.astype(np.float32), rng.integers(0, high, num), rng.integers(0, 12, num)


def test_task_metrics_equal_scikit_learn() -> None:
    logits, actions, users = predictions(3000, width=3, high=8, ties=True)
    result = ranking_metrics(ALL, logits, actions, users, num_tasks=3)

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


def test_retrieval_metrics_by_hand() -> None:
    result = retrieval_metrics(["HR@1", "HR@10", "NDCG@10", "MRR", "MRR@2"], np.array([1.0, 3.0, 10.5, 2.0]))
    assert result["HR@1"] == 1 / 4
    assert result["HR@10"] == 3 / 4  # a tie across the cut stands in its middle, beyond it
    assert result["NDCG@10"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(3)) / 4)
    assert result["MRR"] == pytest.approx((1 + 1 / 3 + 1 / 10.5 + 1 / 2) / 4)
    assert result["MRR@2"] == pytest.approx((1 + 1 / 2) / 4)


# --- tasks that users define ------------------------------------------------------------------------------------------

CLASSES = 4
NAN = math.nan
Row = tuple[Any, float, int, int]
"""Prediction, label or nan, user, request."""


def names_of(kind: str) -> tuple[str, ...]:
    """The metrics of a kind, with 2 for each K."""
    return tuple(re.sub("K$", "2", name) for name in METRICS_OF_KIND[kind])


def mean(values: Iterable[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else NAN


# --- each metric as a loop -----------------------------------------------------------------------------------------


def pair_share(pairs: Iterable[tuple[float, float]]) -> float:
    """Mean over (score of the larger label, score of the smaller one)."""
    return mean([(a > b) + 0.5 * (a == b) for a, b in pairs])


def auc_by_pairs(scores: Sequence[float], positive: Sequence[bool]) -> float:
    rows = list(zip(scores, positive, strict=True))
    return pair_share([(a, b) for (a, p), (b, q) in itertools.product(rows, rows) if p and not q])


def gauc(scores: Sequence[float], positive: Sequence[bool], users: Sequence[int]) -> float:
    total, impressions = 0.0, 0
    for user in set(users):
        own = [index for index, other in enumerate(users) if other == user]
        area = auc_by_pairs([scores[i] for i in own], [positive[i] for i in own])
        if not math.isnan(area):
            total, impressions = total + area * len(own), impressions + len(own)
    return total / impressions if impressions else NAN


def ndcg(scores: Sequence[float], gains: Sequence[float], requests: Sequence[int], cutoff: float) -> float:
    values = []
    for request in sorted(set(requests)):
        own = [(s, g) for s, g, r in zip(scores, gains, requests, strict=True) if r == request]
        best = sorted((g for _, g in own), reverse=True)
        if best[0] == best[-1]:
            continue
        discount = [1 / math.log2(rank + 2) if rank < cutoff else 0.0 for rank in range(len(own))]
        reached = 0.0
        for score, gain in own:
            first = sum(other > score for other, _ in own)
            tied = sum(other == score for other, _ in own)
            reached += gain * sum(discount[first : first + tied]) / tied
        values.append(reached / sum(g * d for g, d in zip(best, discount, strict=True)))
    return mean(values)


def reference(name: str, kind: str, rows: Sequence[Row]) -> float:
    """A metric of rows (prediction, label, user, request) without missing labels."""
    if not rows:
        return NAN
    predictions, labels, users, requests = (list(column) for column in zip(*rows, strict=True))
    if kind == "class":
        return class_reference(name, predictions, labels, users)
    if kind == "binary" and not name.startswith("NDCG"):
        return class_reference(name, [(0.0, logit) for logit in predictions], labels, users)
    if name.startswith("NDCG"):
        return ndcg(predictions, labels, requests, 2 if name == "NDCG@2" else math.inf)
    if name == "AUC>=2":
        return auc_by_pairs(predictions, [label >= 2 for label in labels])
    errors = [abs(label - x) for x, label in zip(predictions, labels, strict=True)]
    return math.sqrt(mean([error**2 for error in errors])) if name == "RMSE" else mean(errors)


def class_reference(name: str, logits: Sequence[Sequence[float]], labels: Sequence[int], users: Sequence[int]) -> float:
    shares = [[math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in logits]
    losses = [-math.log(row[label]) for row, label in zip(shares, labels, strict=True)]
    columns = [([row[c] for row in shares], [label == c for label in labels]) for c in range(len(logits[0]))]
    if name == "AUC":
        return mean([auc_by_pairs(*column) for column in columns])
    if name == "GAUC":
        return mean([gauc(*column, users) for column in columns])
    if name == "AUC>=2":
        return auc_by_pairs([1 - row[0] - row[1] for row in shares], [label >= 2 for label in labels])
    if name == "ACC":
        return mean([row.index(max(row)) == label for row, label in zip(logits, labels, strict=True)])
    if name == "LOGLOSS":
        return mean(losses)
    rates = [labels.count(c) / len(labels) for c in set(labels)]
    return mean(losses) / -sum(r * math.log(r) for r in rates) if len(rates) > 1 else NAN


# --- random tasks --------------------------------------------------------------------------------------------------

QUARTERS = st.integers(-6, 6).map(lambda number: number / 4)
"""Few values, so that scores tie."""
FEW_LOGITS = np.random.default_rng(0).normal(size=(8, CLASSES)).astype(np.float32).tolist()
"""Few rows, so that scores tie. Logits on a grid would give probabilities that differ by rounding alone."""


def rows_of(kind: str) -> st.SearchStrategy[list[Row]]:
    """Lists of (prediction, label or nan, user, request)."""
    prediction = st.sampled_from(FEW_LOGITS) if kind == "class" else QUARTERS
    label = {"binary": st.integers(0, 1), "class": st.integers(0, CLASSES - 1)}.get(
        kind, st.integers(0, 8).map(lambda number: number / 2)
    )
    ids = st.integers(0, 3)
    return st.lists(st.tuples(prediction, label | st.just(NAN), ids, ids), max_size=14)


def measured(kind: str, rows: Sequence[Row], names: tuple[str, ...] | None = None, **options: Any) -> dict[str, float]:
    """Metrics of the rows."""
    width = (CLASSES,) if kind == "class" else ()
    predictions, labels, users, requests = zip(*rows, strict=True) if rows else [()] * 4
    return TaskMetrics(names or names_of(kind), kind, **options).compute(
        np.array(predictions, dtype=np.float32).reshape(len(rows), *width),
        np.array(labels, dtype=np.float32),
        np.array(users, dtype=np.int64),
        np.array(requests, dtype=np.int64),
    )


@pytest.mark.parametrize("kind", METRICS_OF_KIND)
def test_every_metric_equals_loops_over_pairs_and_requests(kind: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(rows_of(kind))
    def check(rows: Sequence[Row]) -> None:
        known = [row for row in rows if not math.isnan(row[1])]
        expected = {name: reference(name, kind, known) for name in names_of(kind)}
        assert measured(kind, rows) == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)

    check()


# --- equal but for rounding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METRICS_OF_KIND)
def test_rounding_does_not_order_equal_candidates(kind: str) -> None:
    """Equal candidates of a user are scored by one process, and then by others that round in another way."""
    rng = np.random.default_rng(6)
    users = np.repeat(np.arange(30), 24)
    labels = rng.integers(0, 2 if kind == "binary" else 4, len(users)).tolist()
    few = np.array(FEW_LOGITS) if kind == "class" else np.array(FEW_LOGITS[:2]).ravel()
    scores = few[rng.integers(0, 8, len(users))]
    scores = scores * (1 + users / 100).reshape(-1, *[1] * (scores.ndim - 1))  # the histories of users differ
    names = tuple(name for name in names_of(kind) if "AUC" in name or "NDCG" in name)

    def metrics(predictions: np.ndarray, order: np.ndarray) -> dict[str, float]:
        rows = list(zip(predictions.tolist(), labels, users.tolist(), users.tolist(), strict=True))
        return measured(kind, [rows[row] for row in order], names)

    expected = metrics(scores, np.arange(len(users)))
    assert not any(map(math.isnan, expected.values()))
    for _ in range(3):
        rounded = scores * (1 + rng.uniform(-1e-6, 1e-6, scores.shape))
        assert metrics(rounded, rng.permutation(len(users))) == pytest.approx(expected, rel=1e-12)


def test_differences_above_rounding_stay_also_among_many_scores() -> None:
    close, far = (
        np.array([1.0, 1 + ROUNDING / 3, 1 - ROUNDING / 3]),
        np.array([1.0, 1 + 2 * ROUNDING, 1 - 2 * ROUNDING]),
    )
    two_users = np.repeat([3, 1], 3)
    merged = [1 - ROUNDING / 3] * 3
    assert without_rounding(np.concatenate([close, far]), two_users).tolist() == [*merged, *far]
    assert without_rounding(np.concatenate([far, close]), two_users).tolist() == [*far, *merged]
    assert without_rounding(np.array([*close, 1000]), np.zeros(4)).tolist() == [*merged, 1000]
    many = np.linspace(-1, 1, 10**6)  # each is close to the next
    assert (without_rounding(many, np.zeros(len(many))) == many).all()


# --- what is undefined or wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "labels", "undefined"),
    [
        ("binary", [1.0, 1.0, NAN], {"AUC", "GAUC", "NE", "NDCG", "NDCG@2"}),
        ("regression", [2.5, 2.5, NAN], {"AUC>=2", "NDCG", "NDCG@2"}),
    ],
)
def test_a_metric_that_labels_do_not_define_is_nan_and_names_the_task_and_the_reason(
    kind: str, labels: Sequence[float], undefined: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [(0.5 * i, label, 0, 0) for i, label in enumerate(labels)]
    result = measured(kind, rows, task="click")
    assert {name for name, value in result.items() if math.isnan(value)} == undefined
    for name in undefined:
        assert f"{name} of task 'click' is undefined (nan): " in caplog.text


@pytest.mark.parametrize("kind", METRICS_OF_KIND)
@pytest.mark.parametrize("rows", [[], [None]])
def test_without_a_known_label_all_metrics_are_nan(
    kind: str, rows: list[None], caplog: pytest.LogCaptureFixture
) -> None:
    prediction = [0.0] * CLASSES if kind == "class" else NAN
    result = measured(kind, [(prediction, NAN, 0, 0) for _ in rows], task="click")
    assert list(result) == list(names_of(kind))
    assert all(math.isnan(value) for value in result.values())
    assert "metrics of task 'click' are undefined (nan): the evaluation set has no labelled items" in caplog.text


def test_a_task_that_diverged_has_no_metrics(caplog: pytest.LogCaptureFixture) -> None:
    result = measured("regression", [(0.5, 1.0, 0, 0), (math.inf, 2.0, 0, 0)])
    assert all(math.isnan(value) for value in result.values())
    assert "not finite" in caplog.text


def test_negative_labels_have_no_ndcg(caplog: pytest.LogCaptureFixture) -> None:
    rows = [(0.5, -1.0, 0, 0), (1.5, 2.0, 0, 0)]
    result = measured("regression", rows, ("NDCG", "MAE"))
    assert math.isnan(result["NDCG"]) and result["MAE"] == 1.0
    assert "a gain must not be negative, but a label is -1" in caplog.text


@pytest.mark.parametrize(
    ("kind", "label", "text"),
    [
        ("binary", 2.0, "classes 2 … 2, but there are logits for 2"),
        ("class", 4.0, "classes 4 … 4"),
        ("class", -1.0, "classes -1 … -1"),
        ("class", 1.5, "labels of task 'stars' must be whole numbers"),
    ],
)
def test_labels_outside_the_classes_are_refused(kind: str, label: float, text: str) -> None:
    prediction = [0.0] * CLASSES if kind == "class" else 0.0
    with pytest.raises(ValueError, match=text):
        measured(kind, [(prediction, label, 0, 0)], task="stars")


def test_metrics_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'RMSE' is not a metric of binary tasks; allowed: AUC, .*NDCG@K"):
        TaskMetrics(("AUC", "RMSE"), "binary")
    assert fits_kind("NDCG@10", "binary") and fits_kind("AUC>=0", "class")
    assert not any(fits_kind(name, "class") for name in ("NDCG@0", "NDCG@", "NDCG@2x", "AUC@2", "AUC>=", "HR@10"))


def mean_of(values: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    return {"mean": float(values[rows].mean())}


@pytest.mark.parametrize("repeats", [1, 4])
def test_intervals_are_over_users(repeats: int) -> None:
    """Four equal answers of each user say no more than one of each."""
    draw, halves = np.random.default_rng(0), []
    users = np.repeat(np.arange(1000), repeats)
    for _ in range(100):
        hits = np.repeat(draw.random(1000) < 0.2, repeats)
        halves.append(half_widths(partial(mean_of, hits), users)["mean"])
    assert np.mean(halves) == pytest.approx(2.093 * math.sqrt(0.2 * 0.8 / 1000), rel=0.05) and np.std(halves) < 0.005

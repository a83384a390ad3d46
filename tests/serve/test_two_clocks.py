"""Both numbers of retrieval, recomputed in NumPy from vectors and raw events, and attacked with altered data."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from hstu import api
from hstu.base.errors import DataError
from hstu.data.sampling.splits import Period
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve.loaded import LoadedModel, with_store
from hstu.serve.predict import evaluate_split
from scripts import evaluate
from tests.conftest import write_small_store
from tests.distributed.launch import run_cases
from tests.train.tiny import enlarge, run, skip_measuring_the_peak, tiny_config

USERS, EVENTS, ITEMS = 40, 7, 30
GAPS = np.array([0, 30, 2_000, 50_000, 900_000])
LAST = np.arange(EVENTS - 1, USERS * EVENTS, EVENTS)
"""The last event of each user."""


def write_store(path: Path, attack: str = "") -> SequenceStore:
    """Random events. ``attack`` alters, for all users, the last event, or the time or the item of the one before it,
    which is the target of "valid"."""
    rng = np.random.default_rng(0)
    items = np.array([rng.permutation(ITEMS)[:EVENTS] for _ in range(USERS)])
    actions = rng.integers(0, 4, (USERS, EVENTS))
    times = 10**6 + rng.choice(GAPS, (USERS, EVENTS)).cumsum(axis=1)
    if attack == "future":
        items[:, -1], actions[:, -2:], times[:, -1] = rng.integers(0, ITEMS, USERS), 3, times[:, -1] + 7_000
    elif attack == "time":
        times[:, -2:] += 70_000
    elif attack == "last day":
        times[:, -1] = times.max() + 86_400
    elif attack == "item":
        items[:, -2] = rng.integers(0, ITEMS, USERS)
    lists = {"actions": actions.tolist(), "timestamps": times.tolist()}
    return write_small_store(path, items.tolist(), **lists, num_items=ITEMS, num_actions=4)


@pytest.fixture(scope="module")
def path(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that may be asked with and without the time of the request."""
    skip_measuring_the_peak()
    folder = tmp_path_factory.mktemp("clocks")
    config = tiny_config(
        "retrieval", write_store(folder / "store"), folder,
        dataset={"query_time": "either", "max_sequence_length": 5, "contextual_feature_names": []},
        network={"position_encoding": "relative_bias"}, task_args={"eval_metrics": ("HR@5", "NDCG@5", "MRR")},
        trainer={
            "max_train_iters": 10, "eval_at_end": True, "ckpt_save_interval": 10, "best_metric": "HR@5/last_event",
        },
    )  # fmt: skip
    finished = run(config, mesh)
    assert finished.summary["best"]["metric"] == "HR@5/last_event"
    yield finished.path


def own_evaluation(path: Path, mesh: Mesh, targets: np.ndarray = LAST) -> pd.DataFrame:
    """Ranks of these events' items, told the time and not, from nothing but vectors and the columns of the store."""
    model, ends = api.load(path, mesh=mesh), targets + 1
    items, times = (np.asarray(model.store.sequence(name)) for name in ("item_id", "timestamp"))
    histories = [
        history.cut(slice(0, place))
        for history, place in zip(model.histories_of(targets // EVENTS), targets % EVENTS, strict=True)
    ]
    corpus, columns = model.item_embeddings().numpy().astype(np.float64), {"gap": times[ends - 1] - times[ends - 2]}
    for suffix, at in (("", times[ends - 1].tolist()), ("_last_event", None)):
        vectors = model.user_vectors(model.encoder.batches(histories), at).numpy().astype(np.float64)
        ranks = []
        for vector, end in zip(vectors, ends, strict=True):
            scores = corpus @ vector
            target = scores[items[end - 1]]
            scores[items[(end - 1) // EVENTS * EVENTS : end - 1]] = -np.inf
            ranks.append(1 + (scores > target).sum())
        columns[f"rank{suffix}"] = np.array(ranks)
    return pd.DataFrame(columns)


def means(ranks: "pd.Series[int]") -> dict[str, float]:
    return {
        "HR@5": (ranks <= 5).mean(),
        "NDCG@5": ((ranks <= 5) / np.log2(ranks + 1)).mean(),
        "MRR": (1 / ranks).mean(),
    }


def test_an_evaluator_of_ones_own_finds_both_numbers_and_the_table_of_gaps(
    path: Path, here: Path, mesh: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    own = own_evaluation(path, mesh)
    outputs = ["--output", str(here / "out.json"), "--per_user", str(here / "rows.parquet")]
    assert evaluate.main(["--run_dir", str(path), *outputs]) == 0
    written, rows = json.loads((here / "out.json").read_text()), pd.read_parquet(here / "rows.parquet")
    for column in own:
        assert (rows[column] == own[column]).all(), column
    groups = {
        "same second": 0,
        "within a minute": 30,
        "within an hour": 2_000,
        "within a day": 50_000,
        "later": 900_000,
    }
    assert sorted(written["by_gap"]) == sorted(groups)
    parts = [(written["metrics"], own)]
    for name, gap in groups.items():
        parts.append((written["by_gap"][name]["metrics"], own[own["gap"] == gap]))
        assert written["by_gap"][name]["targets"] == len(parts[-1][1])
    for found, of_own in parts:
        asked = {f"{name}/last_event": value for name, value in means(of_own["rank_last_event"]).items()}
        assert found == pytest.approx(means(of_own["rank"]) | asked, rel=1e-12)
    assert written["metrics"] == json.loads((path / "summary.json").read_text())["last_metrics"]["test"]
    printed = capsys.readouterr().out.split("By the time since the event before:")[1]
    assert printed.split()[:6] == ["gap", "targets", "HR@5", "NDCG@5", "HR@5/last_event", "NDCG@5/last_event"]


Told = dict[tuple[int, int], tuple[int, ...]]
"""(user, item) → time, and rank by both clocks."""


def of_period(mesh: Mesh, path: Path, period: Period, round_numbers: int) -> tuple[dict[str, float], Any, Told]:
    """Metrics of a period, what is new in it and, on the main rank, its targets."""
    model = LoadedModel.load(path, mesh=mesh)
    with mock.patch("hstu.train.evaluate.ROUND_NUMBERS", round_numbers):
        found = evaluate_split(model, period)
    rows = found.rows(model).select(["user", "item", "time", "rank", "rank_last_event"]).to_pylist()
    return found.metrics(), found.new_counts(), {(user, item): (*told,) for user, item, *told in map(dict.values, rows)}


@pytest.mark.parametrize("first", [False, True])
def test_each_event_of_a_period_is_found_from_what_was_before_it(path: Path, mesh: Mesh, first: bool) -> None:
    store, (since, until) = api.load(path, mesh=mesh).store, (10**6 + 40, 2 * 10**6)
    times, items = (np.asarray(store.sequence(name)) for name in ("timestamp", "item_id"))
    within, before = np.flatnonzero((times >= since) & (times < until)), np.flatnonzero(times < since)
    within = within[np.unique(within // EVENTS, return_index=True)[1]] if first else within
    targets = within[within % EVENTS > 0]
    users, items = targets // EVENTS, items[targets]
    own = own_evaluation(path, mesh, targets)
    new = {
        "/new_users": ~np.isin(users, before // EVENTS),
        "/new_items": ~np.isin(items, store.sequence("item_id")[before]),
    }
    assert len(within) > len(targets) > 20 and new["/new_items"].any() and new["/new_users"].any() != first
    metrics = {
        f"{name}{group}{clock}": value
        for column, clock in (("rank", ""), ("rank_last_event", "/last_event"))
        for group, rows in {"": own.index >= 0, **new}.items()
        for name, value in (means(own[column][rows]) if rows.any() else {}).items()
    }
    counts = {
        f"new_{name}": (len(np.unique(ids[new[f"/new_{name}"]])), new[f"/new_{name}"].sum())
        for name, ids in (("users", users), ("items", items))
    }
    told = zip(times[targets], own["rank"], own["rank_last_event"], strict=True)
    rows = dict(zip(zip(100 + users, 1000 + items, strict=True), told, strict=True))
    case = partial(of_period, path=path, period=Period(since, until, first))
    cases = {name: partial(case, round_numbers=size) for name, size in (("at once", 1 << 22), ("in rounds", 300))}
    of_ranks = run_cases(2, cases)
    for name, one in cases.items():
        for found in (one(mesh), *(rank[name] for rank in of_ranks)):
            assert found[0] == pytest.approx(metrics, rel=1e-12) and found[1] == counts
            assert found[2] == rows or found is of_ranks[1][name]


def test_the_last_events_are_predicted_as_those_of_leave_one_out(path: Path, mesh: Mesh, tmp_path: Path) -> None:
    model = LoadedModel.load(path, mesh=mesh)
    store = write_store(tmp_path / "store", "last day")
    other = LoadedModel.restore(with_store(model.config, store.path), model.checkpoint, mesh)
    last = int(store.sequence("timestamp").max())
    found, expected = (evaluate_split(other, part) for part in (Period(last, last + 1), "test"))
    for one, same in zip(found.observations.columns(), expected.observations.columns(), strict=True):
        assert np.array_equal(one, same)
    assert found.metrics() == expected.metrics() and found.held_out == USERS
    with pytest.raises(DataError, match="has no events since 2096-10-02 07:06:40 UTC; it has"):
        evaluate_split(other, Period(4 * 10**9))


def test_newcomers_stand_apart_in_all_targets_and_not_by_gap(
    here: Path, mesh: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    skip_measuring_the_peak()
    config = tiny_config(
        "retrieval", write_store(here / "store"), here, dataset={"split": "time", "train_fraction": 0.5},
        trainer={"max_train_iters": 1, "eval_at_end": True, "ckpt_save_interval": 1},
    )  # fmt: skip
    assert evaluate.main(["--run_dir", str(run(config, mesh).path)]) == 0
    of_all, by_gap = capsys.readouterr().out.split("By the time since the event before:")
    assert "/new_users" in of_all and "/new_" not in by_gap


def results(model: LoadedModel, store: SequenceStore, **options: Any) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Ranks and scores of the targets of "valid" of other data, [users, clocks], and the queries, told the time."""
    config = with_store(model.config, store.path)
    config = replace(config, dataset=replace(config.dataset, **options))
    other = LoadedModel.restore(config, model.checkpoint, model.mesh)
    enlarge(other.model)
    found = evaluate_split(other, "valid")
    batch = next(other.with_data().eval_batches("valid"))
    queries = other.forward(batch).queries
    assert queries is not None
    return found.observations.results, found.observations.labels, queries


def test_what_comes_after_a_query_does_not_change_its_bits(path: Path, mesh: Mesh, tmp_path: Path) -> None:
    model = LoadedModel.load(path, mesh=mesh)
    attacked = {
        name: results(model, write_store(tmp_path / f"s{name}", name)) for name in ("", "future", "time", "item")
    }
    (ranks, scores, queries), future = attacked[""], attacked["future"]
    assert np.array_equal(future[0], ranks) and np.array_equal(future[1], scores) and torch.equal(future[2], queries)
    later = attacked["time"]
    assert np.array_equal(later[0][:, 1], ranks[:, 1]) and np.array_equal(later[1][:, 1], scores[:, 1])
    assert (later[1][:, 0] != scores[:, 0]).any() and not torch.equal(later[2], queries), "told, they read its time"
    assert torch.equal(attacked["item"][2], queries) and not np.array_equal(attacked["item"][1], scores)


def test_targets_of_the_second_of_the_event_before_may_be_left_out(path: Path, mesh: Mesh, tmp_path: Path) -> None:
    model, store = LoadedModel.load(path, mesh=mesh), write_store(tmp_path / "store")
    gaps = np.diff(np.asarray(store.sequence("timestamp")).reshape(USERS, EVENTS))[:, -2]
    (ranks, scores, _), (kept_ranks, kept_scores, _) = (
        results(model, store, same_second_targets=kept) for kept in (True, False)
    )
    assert 0 < (gaps == 0).sum() < USERS
    assert np.array_equal(kept_ranks, ranks[gaps > 0]) and np.allclose(kept_scores, scores[gaps > 0], atol=1e-6)

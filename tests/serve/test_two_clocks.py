"""Both numbers of retrieval, recomputed in NumPy from vectors and raw events, and attacked with altered data."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from hstu import api
from hstu.data.store.sequence_store import SequenceStore
from hstu.parallel.mesh import Mesh
from hstu.serve.loaded import LoadedModel, with_store
from hstu.serve.predict import evaluate_split
from scripts import evaluate
from tests.conftest import write_small_store
from tests.train.tiny import enlarge, run, skip_measuring_the_peak, tiny_config

USERS, EVENTS, ITEMS = 40, 7, 30
GAPS = np.array([0, 30, 2_000, 50_000, 900_000])


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


def own_evaluation(path: Path, mesh: Mesh) -> pd.DataFrame:
    """Ranks of the last items, told the time and not, from nothing but vectors and the columns of the store."""
    model = api.load(path, mesh=mesh)
    items, times = (np.asarray(model.store.sequence(name)) for name in ("item_id", "timestamp"))
    ends = np.asarray(model.store.offsets())[1:]
    histories = [history.cut(slice(0, -1)) for history in model.histories_of(np.arange(len(ends)))]
    corpus, columns = model.item_embeddings().numpy().astype(np.float64), {"gap": times[ends - 1] - times[ends - 2]}
    for suffix, at in (("", times[ends - 1].tolist()), ("_last_event", None)):
        vectors = model.user_vectors(model.encoder.batches(histories), at).numpy().astype(np.float64)
        ranks = []
        for vector, end in zip(vectors, ends, strict=True):
            scores = corpus @ vector
            target = scores[items[end - 1]]
            scores[items[end - EVENTS : end - 1]] = -np.inf
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

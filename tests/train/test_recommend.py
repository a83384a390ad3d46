"""Recommendations in the user's own ids."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.checkpoint.describe import locate
from hstu.checkpoint.export import export
from hstu.config.errors import ConfigError, DataError
from hstu.config.run_config import RunConfig
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.store import SequenceStore
from hstu.parallel.embedding import dynamic_tables
from hstu.parallel.mesh import Mesh
from hstu.train.recommend import Recommendation, encode_users, recommend_for, table
from tests.train.tiny import ITEMS, run, tables_with_dynamic, tiny_config, walks

TRAINED = {"max_train_iters": 60, "ckpt_save_interval": 1000}


@pytest.fixture(scope="module")
def trained(mesh: Mesh, store: SequenceStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, str]:
    """A run that has learnt the walks, and where its checkpoint is."""
    output = tmp_path_factory.mktemp("trained")
    config = tiny_config("retrieval", store, output, trainer=TRAINED, task_args={"negatives": "full"})
    run(config, mesh)
    return config, str(output / "checkpoints")


def test_users_get_the_next_item_of_their_walk_and_nothing_they_know(mesh: Mesh, trained: Any) -> None:
    users = [user for user, row in enumerate(walks()["items"]) if len(row) < ITEMS - 2]
    recommended = recommend_for(*trained, [100 + user for user in users], 3, mesh)
    next_items = [(walks()["items"][user][-1] + 1) % ITEMS for user in users]
    hits = [1000 + item in entry.items[:2] for item, entry in zip(next_items, recommended, strict=True)]
    assert np.mean(hits) > 0.8
    for user, entry in zip(users, recommended, strict=True):
        assert entry.user == 100 + user
        assert len(entry.items) == len(entry.titles) == len(entry.scores) == 3
        assert not {item - 1000 for item in entry.items} & set(walks()["items"][user])
        assert entry.scores == sorted(entry.scores, reverse=True)
        assert entry.titles == [str(item) for item in entry.items]


def test_no_more_items_are_recommended_than_there_are_unknown_ones(mesh: Mesh, trained: Any) -> None:
    longest = int(np.argmax([len(set(row)) for row in walks()["items"]]))
    known = set(walks()["items"][longest])
    (entry,) = recommend_for(*trained, [100 + longest], 1000, mesh)
    assert sorted(item - 1000 for item in entry.items) == sorted(set(range(ITEMS)) - known)
    assert len(entry.scores) == len(entry.items)


def test_a_user_gets_the_same_whoever_else_asks(mesh: Mesh, trained: Any) -> None:
    (alone,) = recommend_for(*trained, ["103"], 4, mesh)
    together = recommend_for(*trained, ["115", "103", "100", "103"], 4, mesh)
    for entry in (together[1], together[3]):
        assert entry.items == alone.items
        np.testing.assert_allclose(entry.scores, alone.scores, rtol=1e-5)


def test_what_is_printed_has_users_places_scores_and_titles() -> None:
    recommendation = Recommendation("zoe", ["A-7", "B-1"], ["Alpine skis", "B-1"], [0.98765, -0.5])
    assert table([recommendation]).splitlines() == [
        "",
        "user zoe",
        "    1.   0.988  Alpine skis  [A-7]",
        "    2.  -0.500  B-1",
    ]


def test_unknown_users_are_named(mesh: Mesh, trained: Any) -> None:
    with pytest.raises(DataError, match=r"1 raw id\(s\) not in the vocabulary of 'user_id': 99"):
        recommend_for(*trained, ["100", "99"], 3, mesh)
    with pytest.raises(DataError, match=r"user ids are whole numbers, got \['zoe'\]"):
        recommend_for(*trained, ["zoe"], 3, mesh)


def test_a_missing_checkpoint_is_told(mesh: Mesh, trained: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no complete checkpoint"):
        recommend_for(trained[0], str(tmp_path), ["100"], 3, mesh)


def test_ranking_runs_recommend_nothing(mesh: Mesh, store: SequenceStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recommendations need a retrieval run on real data"):
        recommend_for(tiny_config("ranking", store, tmp_path), str(tmp_path), ["100"], 3, mesh)


@pytest.fixture
def named(tmp_path: Path) -> SequenceStore:
    """The walks of users named u0, u1, … over items named item-a, item-b, …"""
    with (tmp_path / "events.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["who", "what", "did"])
        for user, row in enumerate(walks()["items"]):
            writer.writerows([f"u{user}", f"item-{chr(97 + item)}", item % 4] for item in row)
    columns = InteractionColumns(interactions=tmp_path / "events.csv", user="who", item="what", action="did")
    return SequenceStore.open(import_interactions("walks", columns, output=tmp_path / "named"))


def test_string_ids_come_back(mesh: Mesh, named: SequenceStore, tmp_path: Path) -> None:
    assert encode_users(named, ["u1", "u0"]).tolist() == [1, 0]
    config = tiny_config("retrieval", named, tmp_path, sharded=["what"], trainer={"ckpt_save_interval": 1000})
    run(config, mesh)
    (entry,) = recommend_for(config, str(tmp_path / "checkpoints"), ["u0"], 2, mesh)
    known = {f"item-{chr(97 + item)}" for item in walks()["items"][0]}
    assert entry.user == "u0" and len(entry.items) == 2
    assert all(item.startswith("item-") and item not in known for item in entry.items)
    with pytest.raises(DataError, match="'u99'"):
        encode_users(named, ["u99"])


def test_only_items_that_have_a_row_are_recommended(mesh: Mesh, store: SequenceStore, tmp_path: Path) -> None:
    tables = tables_with_dynamic(store, rows=7)
    config = tiny_config("retrieval", store, tmp_path, tables=tables, trainer={"ckpt_save_interval": 1000})
    finished = run(config, mesh)
    held = set(dynamic_tables(finished.trainer.state.model)["movies"].slots.content()[0].tolist())
    known = set(walks()["items"][0])
    (entry,) = recommend_for(config, str(tmp_path / "checkpoints"), ["100"], 1000, mesh)
    assert len(held) == 7 and held - known
    assert sorted(item - 1000 for item in entry.items) == sorted(held - known)
    exported = export(locate(str(tmp_path / "checkpoints")), tmp_path / "exported")
    assert recommend_for(config, str(exported), ["100"], 1000, mesh) == [entry]

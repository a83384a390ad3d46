"""The other retrieval methods: their data and ranks follow our protocol, and a faster loss is that of the library."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("rectools", reason="NEEDS RECTOOLS: see docs/benchmarks/quality/retrieval_peers/README.md")

from hstu.data.store.sequence_store import SequenceStore
from scripts.quality import retrieval_peers as peers
from tests.conftest import write_small_store

ITEMS = 9


@pytest.fixture
def store(tmp_path: Path) -> SequenceStore:
    rng = np.random.default_rng(0)
    users = [rng.permutation(ITEMS)[: rng.integers(4, ITEMS)].tolist() for _ in range(30)]
    return write_small_store(tmp_path / "store", users)


def test_histories_end_before_what_is_held_out(tmp_path: Path) -> None:
    store = write_small_store(tmp_path / "store", [[0, 1, 2, 3], [3, 2, 1]])
    found = {split: peers.Histories.of(store, split) for split in ("train", "valid", "test")}
    assert {split: each.item.tolist() for split, each in found.items()} == {
        "train": [0, 1], "valid": [0, 1, 3], "test": [0, 1, 2, 3, 2],
    }  # fmt: skip
    assert found["valid"].targets is not None and found["test"].targets is not None
    assert (found["valid"].targets.tolist(), found["test"].targets.tolist()) == ([2, 2], [3, 1])


def test_cut_in_time_only_events_before_the_cut_are_known(tmp_path: Path) -> None:
    times = [[0, 1, 2, 8, 9], [3, 4, 5, 7]]
    store = write_small_store(tmp_path / "store", [[0, 1, 2, 3, 4], [3, 2, 1, 0]], timestamps=times)
    cut = {"split": "time", "train_fraction": 0.6}
    train, test = (peers.Histories.of(store, part, **cut) for part in ("train", "test"))
    assert (train.item.tolist(), test.item.tolist()) == ([0, 1], [0, 1, 2, 3, 2])
    assert test.targets is not None and test.targets.tolist() == [3, 1]


@pytest.mark.parametrize("half_life", [None, 2.0])
def test_ranks_are_among_all_items_that_the_user_has_not_seen(store: SequenceStore, half_life: float | None) -> None:
    train, test = peers.Histories.of(store, "train"), peers.Histories.of(store, "test")
    seen = np.zeros((30, ITEMS))
    seen[train.user, train.item] = 1
    inverse = np.linalg.inv(seen.T @ seen + 2.0 * np.eye(ITEMS))  # EASE in float64
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    history = np.zeros((30, ITEMS))
    history[test.user, test.item] = 1.0 if half_life is None else 0.5 ** (test.later / half_life)
    scores = np.where(history > 0, -np.inf, history @ weights)
    assert test.targets is not None
    own = scores[np.arange(30), test.targets]
    model = peers._ease(2.0).fit(train.dataset())
    found = test.ranks(model, half_life, among=1000)
    np.testing.assert_array_equal(found, 1 + (scores > own[:, None]).sum(axis=1))
    np.testing.assert_array_equal(test.ranks(model, half_life, among=2), np.where(found > 2, np.inf, found))


@pytest.mark.parametrize("name", ["sasrec", "esasrec", "gru4rec", "bert4rec"])
def test_the_loss_without_padding_is_the_loss_of_the_library(
    store: SequenceStore, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = peers.Histories.of(store, "train")
    model = peers.PEERS[name][0](train=train, width=8, dropout=0.0)
    monkeypatch.setattr(peers.RealTargets, "log", lambda *_, **__: None)
    model.fit_partial(train.dataset(), min_epochs=1, max_epochs=1)
    module, batch = model.lightning_model, next(iter(model.data_preparator.get_dataloader_train()))
    assert (batch["y"] == 0).any() and ("negatives" in batch) == (name == "esasrec")
    theirs = super(peers.RealTargets, module).training_step(batch, 0)
    torch.testing.assert_close(module.training_step(batch, 0), theirs)


def test_a_sequence_model_ends_with_the_weights_of_its_best_epoch(store: SequenceStore) -> None:
    train, valid = peers.Histories.of(store, "train"), peers.Histories.of(store, "valid")
    model = peers.PEERS["sasrec"][0](train=train, width=8, dropout=0.2)
    best, epoch = peers.fit(model, train, valid, None)
    assert 0 < epoch < model.fit_trainer.fit_loop.max_epochs
    assert peers.retrieval_metrics(["NDCG@10"], valid.ranks(model, None, 10)) == {"NDCG@10": best}


def test_the_command_prints_a_row_per_method(store: SequenceStore, capsys: pytest.CaptureFixture[str]) -> None:
    file, per_user = store.path / "peer.json", store.path / "per_user.csv"
    chosen = ["--peers", "popularity", "ease_recent", "--output", str(file), "--per_user", str(per_user)]
    assert peers.main(["--store", str(store.path), *chosen]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| popularity", "| ease_recent"]
    assert "half_life=" in lines[3]
    metrics, ranks = json.loads(file.read_text())["metrics"], pd.read_csv(per_user)
    assert metrics.keys() == {*peers.METRICS} and metrics["MRR"] == pytest.approx((1 / ranks["rank"]).mean())
    assert ranks["user"].tolist() == store.raw_ids("user_id").tolist()

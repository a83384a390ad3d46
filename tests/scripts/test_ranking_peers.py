"""Other methods that predict ratings: measured on the labels of a run."""

import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hstu.base.errors import ConfigError
from hstu.config.args import DatasetArgs
from hstu.data.sampling.samples import build_samples
from hstu.data.store.sequence_store import SequenceStore
from scripts.quality import ranking_peers
from scripts.quality.ranking_peers import Labels, main, measure, peers
from scripts.quality.ratings import Ratings
from tests.conftest import write_small_store

ARGS = DatasetArgs(dataset_name="films", max_sequence_length=30)


@pytest.fixture
def store(tmp_path: Path) -> SequenceStore:
    """25 users with 10 to 39 ratings of 20 items."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 40, 25)
    items = [rng.integers(0, 20, length).tolist() for length in lengths]
    ratings = [rng.integers(1, 6, length).tolist() for length in lengths]
    return write_small_store(tmp_path / "films", items, actions=ratings)


def test_labels_are_the_newest_ratings_of_the_held_out_users(store: SequenceStore) -> None:
    ratings = Ratings.of(store, 1, 0.7, num_folds=3)
    labels = Labels.of(ratings, build_samples(store, ARGS, "ranking", "valid", 1))
    expected = [
        (event, event - max(stop - 30, start))
        for start, stop, fold in zip(ratings.offsets[:-1], ratings.offsets[1:], ratings.fold, strict=True)
        for event in range(max(stop - 30, start), stop)
        if fold == ratings.held_out
    ]
    assert sorted(zip(labels.events.tolist(), labels.place.tolist(), strict=True)) == expected
    assert (labels.rating == ratings.rating[labels.events]).all()


def test_auc_is_measured_over_all_labels_and_by_place() -> None:
    rng = np.random.default_rng(0)
    rating, place = rng.integers(1, 6, 600), np.tile(np.arange(150), 4)
    scores = rating + rng.normal(0, 2, 600)
    found = measure(scores, Labels(np.arange(600), place, rating), threshold=4)
    assert found["AUC>=4"] == pytest.approx(roc_auc_score(rating >= 4, scores))
    here = (place >= 20) & (place < 50)
    assert found["AUC>=4, 21-50"] == pytest.approx(roc_auc_score(rating[here] >= 4, scores[here]))
    assert len(found) == 5


def test_the_table_has_means_and_standard_errors_over_the_seeds(
    store: SequenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(_: SequenceStore, seed: int, **options: object) -> dict[str, dict[str, float]]:
        return {"mean": {"AUC>=4": 0.7 + seed / 100}}

    monkeypatch.setattr(ranking_peers, "peers", measured)
    command = ["--store", str(store.path), "--output", str(tmp_path / "table.md"), "--no_trees"]
    assert main([*command, "--seeds", "1", "3"]) == 0
    assert "| mean | .7200 ± .0100 | 2 |" in (shown := capsys.readouterr().out)
    assert (tmp_path / "table.md").read_text() == shown


def test_without_lightgbm_the_error_says_how_to_get_it(store: SequenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ConfigError, match=r'pip install "\.\[quality\]", or leave it out with --no_trees'):
        ranking_peers.require_lightgbm()


def test_trees_give_the_probabilities_that_are_measured(store: SequenceStore) -> None:
    pytest.importorskip("lightgbm")
    found = peers(store, 1, args=ARGS, folds=2, tree_rounds=2)[ranking_peers.TREES]
    assert 0.3 < found["AUC>=4"] < 0.7  # the ratings are random
    assert found["LOGLOSS"] == pytest.approx(np.log(5), abs=0.1)

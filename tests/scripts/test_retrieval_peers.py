"""The other retrieval methods: ranks follow the protocol, and EASE is the least-squares solution."""

import json
from pathlib import Path

import numpy as np
import pytest

from hstu.data.store.sequence_store import SequenceStore
from scripts.quality import retrieval_peers as peers
from tests.conftest import write_small_store


@pytest.fixture
def store(tmp_path: Path) -> SequenceStore:
    rng = np.random.default_rng(0)
    return write_small_store(tmp_path / "store", [rng.permutation(9)[: rng.integers(4, 9)].tolist() for _ in range(30)])


def test_histories_end_before_what_is_held_out(tmp_path: Path) -> None:
    store = write_small_store(tmp_path / "store", [[0, 1, 2, 3], [3, 2, 1]])
    found = {split: peers.Histories.of(store, split, 1) for split in ("train", "valid", "test")}
    assert {split: each.items.tolist() for split, each in found.items()} == {
        "train": [0, 1], "valid": [0, 1, 3], "test": [0, 1, 2, 3, 2],
    }  # fmt: skip
    assert found["valid"].targets is not None and found["test"].targets is not None
    assert (found["valid"].targets.tolist(), found["test"].targets.tolist()) == ([2, 2], [3, 1])
    assert peers.Histories.of(store, "train", 0).items.tolist() == [0, 1, 2, 3, 2]


def test_seen_items_are_left_out_and_equal_scores_get_midranks() -> None:
    histories = peers.Histories(np.array([0, 1]), np.array([1, 1]), 4, np.array([2, 1]))
    # Item 0 is seen by the first user; its target 2 shares its score with 3. The second user has seen its own target.
    found = peers.metrics_of(np.array([9.0, 1.0, 2.0, 2.0]), histories)
    assert found["MRR"] == pytest.approx((1 / 1.5 + 1 / 4) / 2)


def test_ease_solves_the_least_squares_problem_with_a_zero_diagonal(store: SequenceStore) -> None:
    train = peers.Histories.of(store, "train", 1)
    weights, matrix = peers.ease(train, 2.0).astype(np.float64), train.matrix().toarray().astype(np.float64)
    assert not np.diag(weights).any()
    slope = matrix.T @ (matrix @ weights - matrix) + 2.0 * weights
    assert abs(slope - np.diag(np.diag(slope))).max() < 1e-4


def test_item_knn_has_cosines(store: SequenceStore) -> None:
    pytest.importorskip("implicit", reason="NEEDS IMPLICIT: pip install -e '.[quality]'")
    train = peers.Histories.of(store, "train", 1)
    both = (train.matrix().T @ train.matrix()).toarray()
    norms = np.sqrt(np.diag(both))
    exact = both / np.maximum(np.outer(norms, norms), 1e-9)
    np.testing.assert_allclose(peers.item_knn(train).toarray(), exact, atol=1e-6)


def test_the_command_prints_a_row_per_method(store: SequenceStore, capsys: pytest.CaptureFixture[str]) -> None:
    file = store.path / "peer.json"
    chosen = ["--peers", "popularity", "ease_recent", "--output", str(file)]
    assert peers.main(["--store", str(store.path), *chosen]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| popularity", "| ease_recent"] and "half_life=" in lines[
        3
    ]
    assert json.loads(file.read_text())["metrics"].keys() == {*peers.METRICS}

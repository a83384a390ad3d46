"""The popularity baseline of the quick start's report: against loops on a toy store, and its figures on real data."""

from typing import Any

import numpy as np
import pytest

from hstu.config.args import DatasetArgs
from hstu.data.sampling.samples import build_samples
from hstu.data.store.sequence_store import SequenceStore
from scripts.quickstart_report import _popularity_ranks, popularity_baseline
from tests.conftest import MakeStore


def args(**options: Any) -> DatasetArgs:
    defaults: dict[str, Any] = {"dataset_name": "toy", "max_sequence_length": 200, "valid_items": 0}
    return DatasetArgs(**(defaults | options))


def test_popularity_ranks_equal_a_loop_over_users(make_store: MakeStore) -> None:
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 12, rng.integers(2, 20)).tolist() for _ in range(40)]
    store = make_store(histories, num_items=14)
    test = build_samples(store, args(), "retrieval", "test", seed=0)
    counts = rng.integers(0, 4, 14)
    expected = []
    for *seen, target in histories:
        rivals = [counts[item] for item in range(14) if item not in seen and item != target]
        expected.append(1 + sum(c > counts[target] for c in rivals) + sum(c == counts[target] for c in rivals) / 2)
    items = np.asarray(store.sequence(store.item_feature))
    np.testing.assert_array_equal(_popularity_ranks(counts, items, test), expected)


def test_popularity_counts_training_events_only_and_all_of_them(make_store: MakeStore) -> None:
    # Item 0 is popular among held-out items only; item 1 among events that truncation drops.
    store = make_store([[1, 1, 1, 2, 3, 0], [1, 4, 3, 0], [2, 3, 1]], num_items=5)
    data = args(max_sequence_length=2)
    train, test = (build_samples(store, data, "retrieval", split, seed=0) for split in ("train", "test"))
    # Counts 1: 4, 3: 3, 2: 2, 4: 1, 0: 0. User 2 has seen 2 and 3: item 1 is first. The others' unseen items but
    # the target 0 are 4 for user 0 and 2 for user 1: rank 2.
    assert popularity_baseline(store, train, test, ["MRR"])["MRR"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)


def test_popularity_on_movielens_100k(ml_100k_store: SequenceStore) -> None:
    train, test = (build_samples(ml_100k_store, args(), "retrieval", split, seed=0) for split in ("train", "test"))
    result = popularity_baseline(ml_100k_store, train, test, ["HR@10", "NDCG@10"])
    assert result == {"HR@10": pytest.approx(0.086, abs=5e-4), "NDCG@10": pytest.approx(0.044, abs=5e-4)}

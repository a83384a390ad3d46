from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.config.args import DatasetArgs
from hstu.config.errors import ConfigError, DataError
from hstu.data.samples import SampleTable
from hstu.data.sequences import build_samples, resolve_split
from hstu.data.store import SequenceStore
from tests.data.toy_store import ToyStore


def dataset_args(length: int = 100, **options: object) -> DatasetArgs:
    return DatasetArgs(dataset_name="toy", max_sequence_length=length, **options)


@dataclass(frozen=True)
class Sample:
    """What a sample says, spelt out as lists of flat event numbers."""

    user: int
    events: list[int]
    candidates: list[int]
    labelled: list[int]
    target: int | None = None


def spelt_out(table: SampleTable) -> list[Sample]:
    samples = []
    for row in range(len(table)):
        events = list(range(table.start[row], table.stop[row]))
        samples.append(
            Sample(
                user=int(table.user[row]),
                events=events,
                candidates=events[len(events) - table.num_candidates[row] :],
                labelled=events[len(events) - table.num_labels[row] :],
                target=None if table.target is None else int(table.target[row]),
            )
        )
    return samples


Rows = list[tuple[int, int]]  # (user, time) of a raw file, in its order


def histories(rows: Rows) -> dict[int, list[int]]:
    """user -> its events' flat numbers after the stable sort by (user, time) that stores are made with."""
    ordered = sorted(rows)
    return {user: [n for n, row in enumerate(ordered) if row[0] == user] for user, _ in ordered}


def store_of(rows: Rows) -> ToyStore:
    times = [[time for user, time in sorted(rows) if user == wanted] for wanted in histories(rows)]
    return ToyStore([[0] * len(row) for row in times], times=times)


raw_tables = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), min_size=1, max_size=60)
lengths = st.integers(2, 7)


@settings(max_examples=150, deadline=None)
@given(raw_tables, lengths, st.sampled_from([0, 1]), st.sampled_from(["train", "valid", "test"]))
def test_leave_one_out_equals_a_plain_reference(rows: Rows, length: int, valid_items: int, split: str) -> None:
    expected = []
    for user, history in enumerate(histories(rows).values()):
        if split == "train":
            kept = history[: max(0, len(history) - 1 - valid_items)][-length:]
            if len(kept) >= 2:
                expected.append(Sample(user, kept, [], kept[1:]))
        else:
            held_out = len(history) - (2 if split == "valid" and valid_items else 1)
            if held_out >= 1:
                expected.append(Sample(user, history[:held_out][-length:], [], [], history[held_out]))
    args = dataset_args(length, valid_items=valid_items)
    assert spelt_out(build_samples(store_of(rows), args, "retrieval", split, seed=0)) == expected


@settings(max_examples=150, deadline=None)
@given(raw_tables, lengths, st.integers(0, 3), st.floats(0.1, 0.9), st.sampled_from(["train", "valid", "test"]))
def test_the_time_split_equals_a_plain_reference(
    rows: Rows, length: int, candidates: int, fraction: float, split: str
) -> None:
    candidates = min(candidates, length - 1)
    all_times = sorted(time for _, time in rows)
    cut = all_times[int(fraction * len(rows))]
    ordered, expected = sorted(rows), []
    for user, history in enumerate(histories(rows).values()):
        after = [event for event in history if ordered[event][1] >= cut]
        before = history[: len(history) - len(after)]
        events, labelled = (before, before) if split == "train" else (history, after)
        chosen = labelled[-candidates:] if candidates else []
        if labelled and len(events) >= 1 + len(chosen) and not (split == "train" and len(events) <= candidates):
            kept = events[-length:]
            expected.append(Sample(user, kept, chosen, chosen if candidates else labelled[-length:]))
    args = dataset_args(length, split="time", train_fraction=fraction, max_num_candidates=candidates)
    assert spelt_out(build_samples(store_of(rows), args, "ranking", split, seed=0)) == expected


@settings(max_examples=150, deadline=None)
@given(raw_tables, lengths, st.integers(0, 3), st.integers(0, 3))
def test_user_holdout_has_every_long_enough_user_in_exactly_one_split(
    rows: Rows, length: int, candidates: int, seed: int
) -> None:
    candidates = min(candidates, length - 1)
    args = dataset_args(length, max_num_candidates=candidates)
    expected = []
    for user, history in enumerate(histories(rows).values()):
        if len(history) > candidates:
            kept = history[-length:]
            expected.append(Sample(user, kept, kept[len(kept) - candidates :], kept[-(candidates or length) :]))
    store = store_of(rows)
    train, valid, test, everyone = (
        spelt_out(build_samples(store, args, "ranking", split, seed)) for split in ("train", "valid", "test", "all")
    )
    assert valid == test
    assert sorted(train + valid, key=lambda sample: sample.user) == expected == everyone


def test_user_holdout_goes_by_raw_ids_not_by_the_order_of_users() -> None:
    raw_users = [f"user-{n}" for n in range(200)]
    shuffled = np.random.default_rng(0).permutation(200)

    def chosen(raw: list[str], seed: int) -> set[str]:
        store = ToyStore([[1, 2]] * 200, raw_users=raw)
        return {raw[user] for user in build_samples(store, dataset_args(), "ranking", "train", seed).user}

    first = chosen(raw_users, seed=1)
    assert len(first) == 140
    assert chosen([raw_users[n] for n in shuffled], seed=1) == first
    assert chosen(raw_users, seed=2) != first


@pytest.mark.parametrize("raw_users", [list(range(3000)), [f"u{n}" for n in range(3000)]], ids=["integers", "strings"])
def test_user_holdout_does_not_prefer_small_ids(raw_users: list[object]) -> None:
    store = ToyStore([[1, 2]] * 3000, raw_users=raw_users)
    train = build_samples(store, dataset_args(train_fraction=0.5), "ranking", "train", seed=3).user
    assert len(train) == 1500
    assert 650 < (train < 1500).sum() < 850


def test_the_report_counts_dropped_and_truncated_users() -> None:
    store = ToyStore([[1] * 9, [1] * 5, [1] * 3, [1] * 2, [1]])
    train = build_samples(store, dataset_args(4), "retrieval", "train", seed=0)
    assert train.report == {"users": 5, "samples": 2, "dropped_short": 3, "truncated": 1, "events": 4 + 3}
    test = build_samples(store, dataset_args(4), "retrieval", "test", seed=0)
    assert test.report == {"users": 5, "samples": 4, "dropped_short": 1, "truncated": 1, "events": 4 + 4 + 2 + 1}


def test_real_data_keeps_every_user_in_each_split(ml_100k_store: SequenceStore) -> None:
    args = dataset_args(200)
    for split in ("train", "valid", "test"):
        table = build_samples(ml_100k_store, args, "retrieval", split, seed=0)
        assert table.report["samples"] == 943 and table.report["dropped_short"] == 0
    ranking = dataset_args(200, max_num_candidates=10)
    counts = [len(build_samples(ml_100k_store, ranking, "ranking", split, seed=0)) for split in ("train", "test")]
    assert counts == [660, 283]


def test_a_split_that_the_task_does_not_have_is_refused() -> None:
    assert resolve_split(dataset_args(), "retrieval") == "leave_one_out"
    assert resolve_split(dataset_args(), "ranking") == "user_holdout"
    with pytest.raises(ConfigError, match="allowed: auto, user_holdout, time"):
        resolve_split(dataset_args(split="leave_one_out"), "ranking")


def test_settings_that_leave_no_history_are_refused() -> None:
    store = ToyStore([[1, 2, 3]])
    with pytest.raises(ConfigError, match="max_num_candidates = 3 leaves no room"):
        build_samples(store, dataset_args(3, max_num_candidates=3), "ranking", "train", seed=0)
    with pytest.raises(ConfigError, match="at least 2"):
        build_samples(store, dataset_args(1), "retrieval", "train", seed=0)
    with pytest.raises(ConfigError, match="needs timestamps"):
        build_samples(store, dataset_args(split="time"), "ranking", "train", seed=0)
    with pytest.raises(ConfigError, match="eval_dataset_path is for ranking"):
        build_samples(store, dataset_args(), "retrieval", "all", seed=0)


def test_damaged_offsets_name_the_user() -> None:
    store = ToyStore([[1, 2, 3], [4, 5]])
    store.bounds = np.array([0, 9, 5])
    with pytest.raises(DataError, match="offsets of user 101 are damaged"):
        build_samples(store, dataset_args(), "retrieval", "train", seed=0)

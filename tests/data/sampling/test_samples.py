"""Splits, truncation and windows."""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.base.errors import ConfigError, DataError
from hstu.config.args import DatasetArgs, Task
from hstu.data.sampling.sampler import TrainSampler
from hstu.data.sampling.samples import SampleTable, build_samples
from hstu.data.sampling.splits import Split, check_split
from hstu.data.store.sequence_store import SequenceStore
from tests.data.toy_store import ToyStore, store_of

SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def table(task: Task, lengths: tuple[int, ...], **options: Any) -> SampleTable:
    args = DatasetArgs(dataset_name="toy", **options)
    return build_samples(store_of(*lengths), args, task, "train", seed=1)


def spans(samples: SampleTable) -> list[tuple[int, int, int]]:
    return list(zip(samples.start.tolist(), samples.stop.tolist(), samples.num_labels.tolist(), strict=True))


def test_targets_cannot_be_chosen_by_their_second_in_data_without_times() -> None:
    with pytest.raises(
        ConfigError, match=r"same_second_targets.* has none; remove it, or preprocess the data with a time column"
    ):
        check_split(store_of(5), DatasetArgs(dataset_name="toy", max_sequence_length=4, same_second_targets=False))


def test_a_long_history_gives_windows_back_to_its_first_event() -> None:
    samples = table("retrieval", (12,), max_sequence_length=4, window_stride=3, valid_items=1)  # trained on: 10 events
    assert spans(samples) == [(6, 10, 3), (3, 7, 3), (0, 4, 3)]
    assert samples.report == {"users": 1, "samples": 3, "dropped_short": 0, "truncated": 0, "events": 12}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(2, 20), st.data())
def test_every_event_is_a_label_exactly_once(lengths: list[int], length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length - 1))
    options: dict[str, Any] = {"max_sequence_length": length, "window_stride": stride}
    tasks: dict[Task, int] = {"retrieval": 1, "ranking": 0}
    for task, unlabelled in tasks.items():
        split: dict[str, Any] = (
            {"valid_items": 0} if task == "retrieval" else {"split": "user_holdout", "train_fraction": 0.999}
        )
        store = store_of(*lengths)
        samples = build_samples(store, DatasetArgs(dataset_name="toy", **options, **split), task, "train", 1)
        times = np.zeros(store.num_events, dtype=int)
        for start, stop, labels in spans(samples):
            assert 0 < stop - start <= length and 0 < labels <= stop - start - unlabelled
            times[stop - labels : stop] += 1
        for begin, end in zip(store.bounds[:-1], store.bounds[1:], strict=True):
            trained = end - 1 if task == "retrieval" else end  # the last event is held out
            if trained - begin > unlabelled and begin in samples.history_begin:
                assert (times[begin + unlabelled : trained] == 1).all()
                assert times[begin : begin + unlabelled].sum() == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=30), min_size=1, max_size=6),
    st.integers(2, 9),
    st.sampled_from(["retrieval", "ranking", "candidates"]),
    st.sampled_from([1, 2]),
    st.data(),
)
def test_a_first_run_and_its_phases_label_each_event_once(
    users: list[list[int]], length: int, kind: str, ranks: int, data: st.DataObject
) -> None:
    """The users' events, by the append that brought them. Late events lie between older ones."""
    task: Task = "retrieval" if kind == "retrieval" else "ranking"
    most = data.draw(st.integers(1, length - 1)) if kind == "candidates" else 0
    options: dict[str, Any] = {"max_sequence_length": length, "max_num_candidates": most, "split": "none"}
    options["window_stride"] = data.draw(
        st.one_of(st.integers(1, length - 1), st.just("random")) if most else st.integers(1, length - 1)
    )
    times = [np.zeros(len(row), dtype=int) for row in users]
    expected = [np.zeros(len(row), dtype=int) for row in users]
    for segment in range(3):
        known = [[place for place, number in enumerate(row) if number <= segment] for row in users]
        store = ToyStore(
            [[1] * len(row) for row in known],
            actions=[[1] * len(row) for row in known],
            segments=[[users[user][place] for place in row] for user, row in enumerate(known)],
        )
        events = [(user, place) for user, row in enumerate(known) for place in row]
        for user, row in enumerate(known):
            for place in row[(task == "retrieval" or most > 0) :]:
                expected[user][place] += users[user][place] == segment
        if most and not segment:
            continue  # a first run labels the newest candidates alone
        samples = build_samples(store, DatasetArgs(dataset_name="toy", **options), task, "train", 1, segment)
        if not len(samples):
            continue
        for rank in range(ranks):
            sampler = TrainSampler(len(samples), 2, rank, ranks, seed=3, shuffle=True)
            for plan in takewhile(lambda plan: plan.epoch == 0, sampler):
                for row in plan.indices:
                    start, stop, labels = samples.start[row], samples.stop[row], samples.num_labels[row]
                    assert stop - start <= length and labels <= stop - start - (task == "retrieval" or most > 0)
                    assert (
                        segment == 0
                        or start == samples.history_begin[row]
                        or stop - start == min(length, length - most + labels)
                    )
                    for user, place in events[stop - labels : stop]:
                        times[user][place] += 1
    for user, row in enumerate(users):
        counted = [place for place, number in enumerate(row) if number or not most]
        assert times[user][counted].tolist() == expected[user][counted].tolist()


def dataset_args(length: int = 100, **options: Any) -> DatasetArgs:
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


def timed_store_of(rows: Rows) -> ToyStore:
    times = [[time for user, time in sorted(rows) if user == wanted] for wanted in histories(rows)]
    return ToyStore([[0] * len(row) for row in times], times=times)


raw_tables = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), min_size=1, max_size=60)
lengths = st.integers(2, 7)


@settings(max_examples=60, deadline=None)
@given(raw_tables, lengths, st.sampled_from([0, 1]), st.sampled_from(SPLITS))
def test_leave_one_out_equals_a_plain_reference(rows: Rows, length: int, valid_items: int, split: Split) -> None:
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
    assert spelt_out(build_samples(timed_store_of(rows), args, "retrieval", split, seed=0)) == expected


@settings(max_examples=60, deadline=None)
@given(raw_tables, lengths, st.integers(0, 3), st.floats(0.1, 0.9), st.sampled_from(SPLITS))
def test_the_time_split_equals_a_plain_reference(
    rows: Rows, length: int, candidates: int, fraction: float, split: Split
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
            kept = events[-(length - candidates + len(chosen)) :]
            expected.append(Sample(user, kept, chosen, chosen if candidates else labelled[-length:]))
    args = dataset_args(length, split="time", train_fraction=fraction, max_num_candidates=candidates)
    assert spelt_out(build_samples(timed_store_of(rows), args, "ranking", split, seed=0)) == expected


@settings(max_examples=60, deadline=None)
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
    store = timed_store_of(rows)
    train, valid, test, everyone = (
        spelt_out(build_samples(store, args, "ranking", split, seed)) for split in ("train", "valid", "test", "all")
    )
    assert valid == test
    assert sorted(train + valid, key=lambda sample: sample.user) == expected == everyone


def test_valid_users_are_taken_from_those_that_are_not_trained_on() -> None:
    store = ToyStore([[1, 2]] * 40)

    def users(split: Any, fraction: float) -> list[int]:
        args = dataset_args(train_fraction=0.5, valid_fraction=fraction)
        return sorted(build_samples(store, args, "ranking", split, seed=3).user.tolist())

    train, both = users("train", 0.0), users("valid", 0.0)
    assert users("test", 0.0) == both and users("train", 0.2) == train
    valid, test = users("valid", 0.2), users("test", 0.2)
    assert (len(train), len(valid), len(test)) == (20, 8, 12) and sorted(valid + test) == both
    assert set(valid) < set(users("valid", 0.3)), "users in one order: a larger fraction adds some"


def test_a_fraction_of_few_users_that_leaves_a_split_empty_is_an_error() -> None:
    check_split(ToyStore([[1, 2]] * 10), dataset_args(valid_fraction=0.2))
    said = "of 2 users 1 are trained on, which leaves 1 for valid and 0 for test"
    with pytest.raises(ConfigError, match=f"valid_fraction = 0.2: {said}"):
        check_split(ToyStore([[1, 2]] * 2), dataset_args(valid_fraction=0.2))


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


def test_the_report_counts_dropped_and_truncated_users() -> None:
    store = ToyStore([[1] * 9, [1] * 5, [1] * 3, [1] * 2, [1]])
    train = build_samples(store, dataset_args(4), "retrieval", "train", seed=0)
    assert train.report == {"users": 5, "samples": 2, "dropped_short": 3, "truncated": 1, "events": 4 + 3}
    test = build_samples(store, dataset_args(4), "retrieval", "test", seed=0)
    assert test.report == {"users": 5, "samples": 4, "dropped_short": 1, "truncated": 1, "events": 4 + 4 + 2 + 1}


def test_real_data_keeps_every_user_in_each_split(ml_100k_store: SequenceStore) -> None:
    args = dataset_args(200)
    for split in SPLITS:
        table = build_samples(ml_100k_store, args, "retrieval", split, seed=0)
        assert table.report["samples"] == 943 and table.report["dropped_short"] == 0
    ranking = dataset_args(200, max_num_candidates=10)
    counts = [len(build_samples(ml_100k_store, ranking, "ranking", split, seed=0)) for split in SPLITS[::2]]
    assert counts == [660, 283]


def test_a_split_in_time_needs_times() -> None:
    with pytest.raises(ConfigError, match="needs timestamps"):
        build_samples(ToyStore([[1, 2, 3]]), dataset_args(split="time"), "ranking", "train", seed=0)


def test_damaged_offsets_are_an_error() -> None:
    store = ToyStore([[1, 2, 3], [4, 5]])
    store.bounds = np.array([0, 9, 5])
    with pytest.raises(DataError, match="offsets of the users are damaged"):
        build_samples(store, dataset_args(), "retrieval", "train", seed=0)

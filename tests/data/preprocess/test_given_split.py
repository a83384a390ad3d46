"""Splits that a column of users' own tables gives: how they are read, stored, and become samples."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu.base.errors import ConfigError, DataError
from hstu.config.args import DatasetArgs
from hstu.data.datasets.spec import SPLIT_NAMES
from hstu.data.preprocess.report import format_report
from hstu.data.sampling.samples import SampleTable, build_samples
from hstu.data.sampling.splits import check_split
from hstu.data.store.layout import HeldOut
from hstu.data.store.sequence_store import SequenceStore
from scripts.preprocess_dataset import main
from tests.data.datasets.test_own_files import make, write
from tests.data.toy_store import ToyStore

EVENTS = "u,i,a,t,fold\n1,7,1,10,train\n1,8,2,20,Train\n1,9,3,30,VALID\n1,10,1,40,test\n2,7,2,5,test\n3,8,1,5,train\n"


def split_of(store: SequenceStore) -> list[str]:
    """The split of each event."""
    names = np.full(store.num_events, "train", dtype=object)
    for split in get_args(HeldOut):
        for begin, end in zip(*store.held_out(split), strict=True):
            names[begin:end] = split
    return list(names)


# --- preprocessing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_column_says_to_which_split_an_event_belongs(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / "e.csv", EVENTS)
    if suffix == ".parquet":
        pd.read_csv(file).to_parquet(tmp_path / "e.parquet")
    store = make(tmp_path, tmp_path / f"e{suffix}", action="a", time="t", split="fold")
    assert split_of(store) == ["train", "train", "valid", "test", "test", "train"]
    assert store.split == "fold" and "fold" not in store.features
    assert store.events_by_split() == {"train": 3, "valid": 1, "test": 2}
    assert "split fold, in events: train 3, valid 1, test 2" in format_report(store)
    store.verify_contents()


def test_the_command_takes_the_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = write(tmp_path / "e.csv", EVENTS), tmp_path / "store"
    columns = ["--user", "u", "--item", "i", "--time", "t", "--split", "fold"]
    command = ["--dataset_name", "mine", "--interactions", str(file), *columns, "--output", str(output)]
    assert main(command) == 0
    assert "split fold, in events: train 3, valid 1, test 2" in capsys.readouterr().out
    assert main(command) == 0, "the store fits and is kept"
    assert main([*command[:-4], "--output", str(output)]) == 3
    assert "--split was fold, it is now not given" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "shown"), [("dev", "is 'dev'"), ("", "is empty"), ("train ", "is 'train '")])
def test_another_value_is_an_error_with_its_line(tmp_path: Path, value: str, shown: str) -> None:
    file = write(tmp_path / "e.csv", EVENTS.replace("VALID", value))
    with pytest.raises(DataError, match=rf"e\.csv:4: 'fold' {shown}.*; allowed is train, valid or test"):
        make(tmp_path, file, time="t", split="fold")


@pytest.mark.parametrize("columns", [{"time": "t"}, {}])
def test_splits_out_of_order_are_counted_and_named(tmp_path: Path, columns: dict[str, str]) -> None:
    rows = ["4,7,1,10,test", "4,7,1,11,train", "5,7,1,10,valid", "5,8,1,11,train", "6,7,1,10,test", "6,8,1,11,valid"]
    file = write(tmp_path / "e.csv", EVENTS + "\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"--split fold: 3 user\(s\), the first of them 4, .*first train, then valid"):
        make(tmp_path, file, split="fold", **columns)


def test_events_of_one_time_are_ordered_by_split(tmp_path: Path) -> None:
    file = write(tmp_path / "e.csv", "u,i,t,fold\n1,9,5,test\n1,8,5,valid\n1,7,5,train\n1,6,5,train\n")
    store = make(tmp_path, file, time="t", split="fold")
    assert store.raw_ids("i")[store.sequence("i")].tolist() == [7, 6, 8, 9]
    assert split_of(store) == ["train", "train", "valid", "test"]


@pytest.mark.parametrize(
    ("splits", "message"), [("train", "'valid' or 'test', so there is nothing to evaluate"), ("test", "'train'")]
)
def test_something_is_trained_on_and_something_evaluated(tmp_path: Path, splits: str, message: str) -> None:
    file = write(tmp_path / "e.csv", f"u,i,fold\n1,7,{splits}\n1,8,{splits}\n")
    with pytest.raises(DataError, match=f"--split fold: no event is marked {message}"):
        make(tmp_path, file, split="fold")


def test_bounds_that_are_damaged_are_found(tmp_path: Path) -> None:
    store = make(tmp_path, write(tmp_path / "e.csv", EVENTS), split="fold")
    (bounds := np.load(store.path / "split.test.npy"))[0] = 9
    np.save(store.path / "split.test.npy", bounds)
    with pytest.raises(DataError, match=r"split\.test\.npy is damaged: its SHA-256"):
        SequenceStore.open(store.path)
    store._files._maps.clear()
    with pytest.raises(DataError, match="a split begins outside the events of its user"):
        store.verify_values()
    with pytest.raises(DataError, match="the bounds of its splits are damaged"):
        build_samples(store, options(8), "retrieval", "train", 0)


# --- samples -------------------------------------------------------------------------------------------------------


class SplitStore(ToyStore):
    """Users with so many train, valid and test events."""

    def __init__(self, counts: list[tuple[int, int, int]]) -> None:
        lengths = [sum(user) for user in counts]
        super().__init__([[0] * length for length in lengths], actions=[[1] * length for length in lengths])
        self.split = "fold"
        self.valid = self.bounds[:-1] + np.array([train for train, _, _ in counts])
        self.test = self.valid + np.array([valid for _, valid, _ in counts])

    def held_out(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        return (self.valid, self.test) if split == "valid" else (self.test, self.bounds[1:])


def options(length: int, **given: Any) -> DatasetArgs:
    return DatasetArgs(dataset_name="toy", max_sequence_length=length, **given)


counts = st.lists(st.tuples(*[st.integers(0, 25)] * 3).filter(any), min_size=1, max_size=5)


@given(counts, st.integers(1, 20), st.sampled_from(SPLIT_NAMES))
def test_in_retrieval_every_held_out_event_is_a_target_with_the_history_before_it(
    users: list[tuple[int, int, int]], length: int, split: Any
) -> None:
    store = SplitStore(users)
    samples = build_samples(store, options(length), "retrieval", split, 0)
    begins = store.bounds[samples.user]
    if split == "train":
        assert samples.target is None
        assert (samples.stop == store.valid[samples.user]).all() and (samples.num_labels < samples.stop - begins).all()
        assert len(samples) == sum(train >= 2 for train, _, _ in users)
        return
    begin, end = store.held_out(split)
    wanted = [event for user in range(len(users)) for event in range(begin[user], end[user])]
    assert samples.target is not None
    assert samples.target.tolist() == [event for event in wanted if event not in store.bounds]
    assert (samples.stop == samples.target).all() and (samples.history_begin == begins).all()
    assert (samples.start == np.maximum(begins, samples.stop - length)).all()
    assert samples.report["dropped_short"] == len(wanted) - len(samples)


def labels_of(samples: SampleTable, events: int) -> np.ndarray:
    """How often each event is a label."""
    times = np.zeros(events, dtype=int)
    for stop, labels in zip(samples.stop, samples.num_labels, strict=True):
        times[stop - labels : stop] += 1
    return times


@given(counts, st.integers(2, 20), st.sampled_from(["valid", "test"]), st.data())
def test_in_ranking_every_held_out_event_is_a_label_once_after_its_history(
    users: list[tuple[int, int, int]], length: int, split: Any, data: st.DataObject
) -> None:
    store, candidates = SplitStore(users), data.draw(st.integers(0, length - 1))
    samples = build_samples(store, options(length, max_num_candidates=candidates), "ranking", split, 0)
    expected = np.zeros(store.num_events, dtype=int)
    for begin, end in zip(*store.held_out(split), strict=True):
        expected[begin:end] = 1
    if candidates:  # which need an event before them
        expected[store.bounds[:-1]] = 0
    assert labels_of(samples, store.num_events).tolist() == expected.tolist()
    begins, sizes = store.bounds[samples.user], samples.stop - samples.start
    assert (samples.start >= begins).all() and (sizes <= length).all()
    assert (samples.num_candidates == (samples.num_labels if candidates else 0)).all()
    is_cut = samples.start > begins
    histories = sizes - samples.num_candidates
    assert (histories[is_cut] == length - candidates).all(), "the history is as long as all candidates leave room for"
    if not candidates:
        assert (samples.num_labels[is_cut] <= length // 2).all()


@given(counts, st.integers(2, 20), st.sampled_from(["ranking", "retrieval"]), st.data())
def test_training_never_sees_a_held_out_event(
    users: list[tuple[int, int, int]], length: int, task: Any, data: st.DataObject
) -> None:
    store, stride = SplitStore(users), data.draw(st.none() | st.integers(1, length))
    samples = build_samples(store, options(length, window_stride=stride), task, "train", 0)
    assert (samples.stop <= store.valid[samples.user]).all()
    assert labels_of(samples, store.num_events).max(initial=0) <= 1


def test_options_that_contradict_the_column_are_errors() -> None:
    store = SplitStore([(3, 1, 1)])
    check_split(store, options(8))
    wrong = options(8, split="time", valid_items=0, train_fraction=0.5, valid_fraction=0.1, eval_dataset_path="x")
    with pytest.raises(ConfigError) as raised:
        check_split(store, wrong)
    assert len(raised.value.problems) == 5
    assert (
        "DatasetArgs.valid_items = 0: has no effect, because the data says itself which events are train, valid and "
        "test (column 'fold'); remove it, or preprocess the data without --split" in raised.value.problems
    )

"""Requests: what was shown to users, from their own tables to the store, and from the store to batches."""

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hstu.base.errors import ConfigError, DataError
from hstu.config.args import DatasetArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.data.features.roles import FeatureRoles
from hstu.data.features.values import LabelColumn
from hstu.data.preprocess import forget
from hstu.data.preprocess import write as write_module
from hstu.data.preprocess.report import format_report
from hstu.data.sampling.sampler import EvalSampler
from hstu.data.sampling.samples import build_samples
from hstu.data.sampling.splits import check_requests
from hstu.data.store.layout import REQUEST_FILES
from hstu.data.store.reader import StoreReader
from hstu.data.store.sequence_store import USER_FEATURE, Requests, SequenceStore, request_problems
from scripts.preprocess_dataset import main
from tests.data.collators import build_collator
from tests.data.own_tables import own_store
from tests.data.preprocess.test_restart import arrays, contents, stopped_after_each_stage

EVENTS = """u,i,a,t,device
b,x1,1,20,phone
b,x2,1,10,web
a,x1,2,5,
a,x3,1,7,web
"""
SHOWN = """r,u,i,a,t,device
q1,a,x9,0,7,tv
q1,a,x1,3,8,web
q2,b,x2,0,10,web
q3,b,x3,1,15,
q4,nobody,x5,1,99,web
"""


def make(folder: Path, events: str = EVENTS, shown: str | None = SHOWN, **given: Any) -> SequenceStore:
    for name, text in (("e", events), ("s", shown)):
        if text is not None:
            (folder / f"{name}.csv").write_text(text)
    requests = {"requests": (folder / "s.csv",), "request": "r"} if shown is not None else {}
    defaults: dict[str, Any] = {
        "interactions": folder / "e.csv",
        "action": "a",
        "time": "t",
        "event_columns": ("device",),
        **requests,
    }
    return own_store(folder, **(defaults | given))


def test_impressions_become_requests_of_users_with_a_history(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make(tmp_path)
    store.verify_contents()
    requests = store.requests()
    assert store.raw_ids(USER_FEATURE)[requests.users].tolist() == ["a", "b"]
    assert requests.times.tolist() == [7, 15], "the earliest of a request's rows"
    assert requests.sizes.tolist() == [2, 1]
    assert requests.history_ends.tolist() == [1, 3], "the event in the second of the request is not before it"
    assert store.raw_ids("i")[store.candidates("i")].tolist() == ["x9", "x1", "x3"]
    assert store.candidates("a").tolist() == [0, 3, 1] and store.cardinality("a") == 4
    assert store.raw_ids("device")[store.candidates("device")].tolist() == ["tv", "web", "unknown"]
    assert store.raw_ids("i").tolist() == ["x1", "x2", "x3", "x9"], "what only left out requests show is no item"
    assert "2 of 4 requests, with 2 candidates, are left out" in caplog.text
    assert store.statistics["requests_left_out"] == 2


def test_without_ids_the_rows_of_one_user_and_time_are_a_request(tmp_path: Path) -> None:
    events = "u,i,a,t,device\n1,5,1,1000,w\n2,5,1,900,w\n"
    shown = "u,i,a,t,device\n1,6,1,3500,w\n2,5,0,3500,w\n1,7,0,3500,w\n1,5,0,3501,w\n"
    store = make(tmp_path, events, shown, request=None, time_unit="ms")
    assert store.requests().times.tolist() == [3, 3, 3], "two requests of one second remain two"
    assert store.requests().sizes.tolist() == [2, 1, 1]
    assert store.raw_ids("i")[store.candidates("i")].tolist() == [6, 7, 5, 5]


def test_an_item_that_is_only_shown_has_features(tmp_path: Path) -> None:
    events = "u,i,a,t,topic\na,x,1,1,news\n"
    shown = "r,u,i,a,t,topic\nq,a,y,0,5,food\nq,a,x,0,5,sport\n"
    store = make(tmp_path, events, shown, event_columns=(), item_columns=("topic",))
    assert store.raw_ids("topic")[store.item_values("topic")[0]].tolist() == ["news", "food"]
    assert store.statistics["items"] == 1 and store.cardinality("i") == 2


def test_candidates_have_numbers(tmp_path: Path) -> None:
    events = "u,i,a,t,watched\na,x,1,1,2.5\na,x,0,2,\n"
    shown = "r,u,i,a,t,watched\nq,a,y,0,5,\nq,a,x,0,5,7.5\n"
    watched: dict[str, Any] = {"event_columns": ("watched",), "numbers": ("watched",)}
    store = make(tmp_path, events, shown, **watched)
    store.verify_contents()
    np.testing.assert_array_equal(store.candidates("watched"), np.array([np.nan, 7.5], dtype=np.float32))
    args = DatasetArgs(dataset_name="mine", max_sequence_length=9, candidates="requests")
    samples = build_samples(store, args, "ranking", "all", seed=0)
    roles = FeatureRoles("i", "a", (), ("watched",), numbers=("watched",), labels=("watched",))
    reader = StoreReader(store, samples, roles, labels={"watched": LabelColumn(store, "watched")})
    rows = reader.read(next(iter(EvalSampler(1, 1, 0, 1))))
    assert rows.numbers is not None
    np.testing.assert_array_equal(rows.numbers[:, 0], np.array([2.5, np.nan, np.nan, 7.5], dtype=np.float32))
    np.testing.assert_array_equal(rows.label_values["watched"], np.array([np.nan, 7.5], dtype=np.float32))
    with pytest.raises(DataError, match=r"s\.csv:3: 'watched' is '7,5'"):
        make(tmp_path, events, shown.replace("7.5", '"7,5"'), force=True, **watched)


@pytest.mark.slow
def test_requests_are_given_again_when_events_are_added(tmp_path: Path) -> None:
    whole = arrays(make(tmp_path))
    first, second = EVENTS.rsplit("\n", 2)[0] + "\n", EVENTS.split("\n")[0] + "\n" + EVENTS.split("\n")[-2] + "\n"
    make(tmp_path, first, force=True)
    (tmp_path / "more.csv").write_text(second)
    found = make(tmp_path, first, append=True, interactions=tmp_path / "more.csv")
    assert arrays(found) == whole
    assert "requests 2 of 2 users" in format_report(found)
    make(tmp_path, first, force=True)
    stays = make(tmp_path, first, None, append=True, interactions=tmp_path / "more.csv")
    assert contents(stays.path) == contents(found.path), "requests that are not given stay"
    (tmp_path / "users.txt").write_text("a\n")
    left = SequenceStore.open(forget("mine", tmp_path / "users.txt", output=stays.path))
    assert left.raw_ids("i")[left.candidates("i")].tolist() == ["x3"] and left.requests().history_ends.tolist() == [1]
    assert left.raw_ids("device").tolist() == ["phone", "unknown", "web"]


@pytest.mark.slow
def test_a_run_of_small_buckets_stopped_after_any_stage_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(make(tmp_path).path)
    monkeypatch.setattr(write_module, "_SORT_BYTES_PER_ROW", 2 * 10**9)
    monkeypatch.setattr("hstu.data.preprocess.write.ROWS_PER_CHUNK", 1)
    found, stages = stopped_after_each_stage(monkeypatch, lambda: make(tmp_path, force=True))
    assert {"requests", "buckets of candidates", "candidates from 1"} <= set(stages)
    assert contents(found.path) == whole


@pytest.mark.parametrize(
    ("field", "values", "said"),
    [
        ("users", [1, 0], "users are not ascending"),
        ("times", [9, 7], "a user's requests are not in time order"),
        ("history_ends", [1, 9], "a history ends outside the events of its user"),
        ("history_ends", [2, 2], "a history does not end where its request is"),
        ("offsets", [0, 0, 3], "a request has no candidates"),
    ],
)
def test_damaged_requests_are_named(field: str, values: list[int], said: str) -> None:
    arrays = {"users": [0, 0], "times": [7, 9], "history_ends": [1, 2], "offsets": [0, 1, 3]} | {field: values}
    requests = Requests(**{name: np.array(column) for name, column in arrays.items()})
    problems = dict(request_problems(requests, np.array([0, 3, 5]), np.array([5, 8, 9, 1, 2])))
    assert said in problems[REQUEST_FILES[field]]


# --- batches ---------------------------------------------------------------------------------------------------------

event_rows = st.tuples(
    st.integers(0, 3), st.integers(0, 4), st.integers(0, 2), st.integers(0, 12), st.sampled_from(["p", "w", ""])
)
shown_rows = st.tuples(
    st.integers(0, 4), st.integers(0, 6), st.integers(0, 3), st.integers(0, 14), st.sampled_from(["p", "t"]),
    st.sampled_from("xyz"),
)  # fmt: skip


def reference(events: pd.DataFrame, shown: pd.DataFrame, length: int, most: int) -> pd.DataFrame:
    """A row per sample: user, second of the request, and its items with all they have."""
    samples = []
    for (user, _), rows in shown.groupby(["u", "r"]):
        time = rows["t"].min()
        second = time // 1000
        before = events[(events["u"] == user) & (events["t"] // 1000 < second)].sort_values("t", kind="stable")
        parts = -(-len(rows) // (most or len(rows)))
        bounds = [len(rows) * part // parts for part in range(parts + 1)]
        history = before[-(length - (most or max(np.diff(bounds)))) :]
        for begin, end in pairwise(bounds):
            candidates = rows[begin:end].assign(t=time)
            both = pd.concat([history, candidates])
            samples.append((user, time, rows["r"].iloc[0], begin, second, both, end - begin))
    columns = ["u", "time", "r", "begin", "second", "items", "shown"]
    found = pd.DataFrame([row for row in samples if len(row[5]) > row[6]], columns=columns)
    return found.sort_values(["u", "time", "r", "begin"], ignore_index=True)


def read_all(store: SequenceStore, args: DatasetArgs, split: Any) -> list[tuple[Any, ...]]:
    """Of each sample: user, items, actions, devices, seconds, gaps, labels; in raw values."""
    samples = build_samples(store, args, "ranking", split, seed=3)
    collator = build_collator(store, samples, args, "ranking", batch_size=3, seed=0, wants_timestamps=True)
    return [row for plan in EvalSampler(len(samples), 3, 0, 1) for row in rows_of(store, collator(plan))]


def rows_of(store: SequenceStore, batch: HSTUBatch) -> list[tuple[Any, ...]]:
    assert (batch.num_candidates == batch.num_labels).all() and batch.items.timestamps is not None
    users = store.raw_ids(USER_FEATURE)[batch.user_ids[: batch.real_batch_size].numpy()].tolist()
    values = {name: jagged.values().numpy() for name, jagged in batch.features.to_dict().items()}
    raw = [store.raw_ids("i")[values["i"]], values["a"], store.raw_ids("device")[values["device"]]]
    ends = np.cumsum(batch.item_lengths)[: batch.real_batch_size - 1]
    columns = [np.split(column, ends) for column in [*raw, batch.items.timestamps.numpy(), values["time_gap"]]]
    label_ends = np.cumsum(batch.num_labels.numpy())[: batch.real_batch_size - 1]
    of_each = [*columns, np.split(batch.labels.numpy(), label_ends)]
    return [(user, *(values.tolist() for values in rest)) for user, *rest in zip(users, *of_each, strict=True)]


def check_against_the_reference(event_log: list[Any], shown_log: list[Any], length: int, most: int) -> None:
    events = pd.DataFrame([(9, 1, 1, 0, "p"), *event_log], columns=["u", "i", "a", "t", "device"])
    shown = pd.DataFrame([*shown_log, (9, 1, 1, 14, "p", "x")], columns=["u", "i", "a", "t", "device", "r"])
    for table in (events, shown):
        table["t"] *= 600  # ms, so that some are of one second
    most = most or 0 if shown.groupby(["u", "r"]).size().max() < length else most or 3
    samples = reference(events, shown, length, most)
    with tempfile.TemporaryDirectory() as folder:
        store = make(Path(folder), events.to_csv(index=False), shown.to_csv(index=False), time_unit="ms")
        store.verify_contents()
        side = ["device", "time_gap"]
        options: dict[str, Any] = {"candidates": "requests", "max_num_candidates": most, "side_feature_names": side}
        args = DatasetArgs(dataset_name="mine", max_sequence_length=length, **options)
        every = read_all(store, args, "all")
        by_time = DatasetArgs(dataset_name="mine", max_sequence_length=length, split="time", **options)
        split_by_time = [read_all(store, by_time, split) for split in ("train", "valid")]
        split_by_user = [read_all(store, args, split) for split in ("train", "valid")]
    assert len(every) == len(samples)
    for (user, items, actions, devices, seconds, gaps, labels), (_, expected) in zip(
        every, samples.iterrows(), strict=True
    ):
        rows, number = expected["items"], expected["shown"]
        times = (rows["t"] // 1000).tolist()
        assert (user, items, actions) == (expected["u"], rows["i"].tolist(), rows["a"].tolist())
        assert devices == [device or "unknown" for device in rows["device"]]
        assert seconds == times and labels == actions[-number:]
        last = times[-number - 1]
        assert gaps[-number:] == [int(np.log2(1 + expected["second"] - last)) + 1] * number
    cut = np.sort([sample.second for sample in samples.drop_duplicates(["u", "r"]).itertuples()])
    cut = cut[min(int(0.7 * len(cut)), len(cut) - 1)]
    seconds = samples["second"].tolist()
    assert split_by_time[0] == [row for row, second in zip(every, seconds, strict=True) if second < cut]
    assert split_by_time[1] == [row for row, second in zip(every, seconds, strict=True) if second >= cut]
    assert sorted(map(str, split_by_user[0] + split_by_user[1])) == sorted(map(str, every))
    assert not {row[0] for row in split_by_user[0]} & {row[0] for row in split_by_user[1]}


LOGS = (
    st.lists(event_rows, min_size=1, max_size=25), st.lists(shown_rows, min_size=1, max_size=25),
    st.integers(8, 30), st.integers(0, 4),
)  # fmt: skip


@settings(max_examples=2, phases=[Phase.generate])
@given(*LOGS)
def test_a_log_gives_the_samples_of_a_plain_reference(
    event_log: list[Any], shown_log: list[Any], length: int, most: int
) -> None:
    check_against_the_reference(event_log, shown_log, length, most)


# --- bad inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        (SHOWN.replace("q1,a,x9,0,7,tv", "q1,a,,0,7,tv"), r"s\.csv:2: 'i' is empty"),
        (SHOWN.replace("q3,b,x3,1,15,", "q3,b,x3,,15,"), r"s\.csv:5: 'a' is empty.*allowed is an integer from 0"),
        (SHOWN.replace("q2,b", ",b"), r"s\.csv:4: 'r' is empty"),
        (SHOWN.replace("15,", "soon,"), r"s\.csv:5: 't' is 'soon'"),
        (SHOWN.replace("device", "dev"), r"s\.csv has no column 'device'. Did you mean 'dev'"),
        ("r,u,i,a,t,device\nq,nobody,x,1,5,w\n", r"s\.csv: none of the 1 requests has an event of its user"),
        ("r,u,i,a,t,device\n", r"s\.csv: there are no requests"),
    ],
)
def test_bad_impressions_are_reported_with_their_place(tmp_path: Path, shown: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        make(tmp_path, shown=shown)
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_bad_impressions_can_be_skipped(tmp_path: Path) -> None:
    store = make(tmp_path, shown=SHOWN.replace("q1,a,x9,0,7,tv", "q1,a,,0,7,tv"), bad_row_policy="skip")
    assert store.statistics["skipped_rows"] == {"unusable item": 1}
    assert store.requests().sizes.tolist() == [1, 1] and store.requests().times.tolist() == [8, 15]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"action": None}, "--requests needs --time.*and --action"),
        ({"time": None}, "--requests needs --time"),
        ({"split": "device", "event_columns": ()}, "--requests and --split device"),
        ({"request": "t"}, "--request t: the column is also given"),
        ({"requests": ()}, "--request r: it is a column of --requests"),
        ({"min_item_events": 2}, "--requests keeps items without events"),
    ],
)
def test_options_that_do_not_go_with_requests_are_errors(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(tmp_path, **given)


def test_options_that_the_data_does_not_admit_are_errors(tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()
    plain = make(tmp_path / "without", shown=None)
    args = DatasetArgs(dataset_name="mine", max_sequence_length=2, candidates="requests")
    with pytest.raises(ConfigError, match=r"candidates.*has no requests; preprocess the data with --requests"):
        check_requests(plain, args)
    with pytest.raises(ConfigError, match=r"max_sequence_length.*no room for history beside the 2 candidates"):
        check_requests(make(tmp_path), args)
    check_requests(plain, DatasetArgs(dataset_name="mine", max_sequence_length=2))


def test_the_command_knows_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    arguments = ["--dataset_name", "mine", "--interactions", str(tmp_path / "e.csv"), "--requests",
                 str(tmp_path / "s.csv"), "--request", "r", "--event_columns", "device", "--output",
                 str(tmp_path / "store")]  # fmt: skip
    columns = [word for name, column in zip(("user", "item", "action", "time"), "uiat", strict=True) for word in
               (f"--{name}", column)]  # fmt: skip
    assert main([*arguments, *columns]) == 0
    out = capsys.readouterr().out
    assert "requests 2 of 2 users; candidates 3, per request max 2, mean 1.5; left out 2 requests" in out
    assert "DatasetArgs.candidates = 'requests'" in (tmp_path / "store_ranking.gin").read_text()
    (tmp_path / "s.csv").write_text(SHOWN.replace("q3", "q5"))
    assert main([*arguments, *columns]) == 3
    assert "has changed since" in capsys.readouterr().err

import csv
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.base.errors import ConfigError, DataError
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.store.sequence_store import SequenceStore
from tests.data.own_tables import histories, own_store

MEMBERS, SKUS = ["zoë", "abe", "zoë", "abe", "abe"], [7, -3, 2**63 - 1, 7, 7]
TABLE = pd.DataFrame({"member": MEMBERS, "sku": SKUS, "stars": [5, 0, 2, 3, 1], "when": [20, 11, 20, 10, 10]})


def write(table: pd.DataFrame, file: Path) -> Path:
    if file.suffix == ".parquet":
        table.to_parquet(file)
    else:
        separator = "\t" if file.suffix == ".tsv" else ","
        # By default, pandas does not quote a text with a carriage return, which readers take for the end of a row.
        table.to_csv(file, index=False, sep=separator, quoting=csv.QUOTE_NONNUMERIC)
    return file


def make(folder: Path, table: pd.DataFrame, suffix: str = ".csv", **columns: Any) -> SequenceStore:
    file = write(table, folder / f"events{suffix}")
    return own_store(folder, file, **({"user": "member", "item": "sku", "store": "mine"} | columns))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_table_becomes_a_store_in_time_order_with_ties_in_row_order(tmp_path: Path, suffix: str) -> None:
    store = make(tmp_path, TABLE, suffix, action="stars", time="when")
    assert histories(store) == {"abe": [7, 7, -3], "zoë": [7, 2**63 - 1]}
    assert store.sequence("stars").tolist() == [3, 1, 0, 5, 2]
    assert store.sequence("when").tolist() == [10, 10, 11, 20, 20]
    assert (store.item_feature, store.action_feature, store.timestamp_feature) == ("sku", "stars", "when")
    assert (store.cardinality("sku"), store.cardinality("stars")) == (3, 6)
    assert store.contextual_features == ()


def test_without_a_time_column_the_order_is_that_of_the_file(tmp_path: Path) -> None:
    store = make(tmp_path, TABLE)
    assert histories(store) == {"abe": [-3, 7, 7], "zoë": [7, 2**63 - 1]}
    assert store.timestamp_feature is None and store.action_feature is None


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
int64s = st.integers(-(2**63), 2**63 - 1)
ids = st.one_of(st.just(int64s), st.just(texts))


@settings(max_examples=15, deadline=None)
@given(st.data(), ids, ids, st.sampled_from([".csv", ".parquet"]))
def test_any_ids_come_back_as_they_were(
    data: st.DataObject, users: st.SearchStrategy[Any], items: st.SearchStrategy[Any], suffix: str
) -> None:
    rows = data.draw(st.lists(st.tuples(users, items), min_size=1, max_size=30))
    expected: dict[str, list[str]] = {}
    for user, item in rows:
        expected.setdefault(str(user), []).append(str(item))
    with tempfile.TemporaryDirectory() as folder:
        store = make(Path(folder), pd.DataFrame(rows, columns=["member", "sku"]), suffix)
        found = {str(user): [str(item) for item in history] for user, history in histories(store).items()}
        assert found == expected
        raw = store.raw_ids("sku")
        assert sorted(raw.tolist()) == raw.tolist()
        assert store.encode("sku", raw).tolist() == list(range(len(raw)))


@pytest.mark.parametrize(
    ("users", "items"), [(range(5), ["0\r", "0\r0", "\r", "0\n", "0\r\n0"]), (["007", "7"], ["1", "01"])]
)
def test_ids_with_ends_of_lines_or_leading_zeros_stay_apart(tmp_path: Path, users: Any, items: list[str]) -> None:
    store = make(tmp_path, pd.DataFrame({"member": users, "sku": items}))
    assert histories(store) == {user: [item] for user, item in zip(users, items, strict=True)}


def test_context_follows_its_columns_and_is_unknown_where_missing(tmp_path: Path) -> None:
    context = pd.DataFrame({"member": ["zoë", "gone"], "town, or city": ["Ulm", "Rom"], "age": [31, 5]})
    members = write(context, tmp_path / "members.csv")
    store = make(tmp_path, TABLE, context=members, context_columns=("age", "member", "town, or city"))
    assert store.contextual_features == ("age", "user_id", "town, or city")
    assert store.raw_ids("age")[store.context("age")].tolist() == ["unknown", "31"]
    assert store.raw_ids("town, or city")[store.context("town, or city")].tolist() == ["unknown", "Ulm"]
    assert store.context("user_id").tolist() == [0, 1]
    assert "Rom" not in store.raw_ids("town, or city"), "users without events are left out"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("users", "described", "ages"),
    [
        ([5, -5], ["-5", "x", "005"], ["0", "unknown"]),  # integers match by number
        (["abe", "zoë"], ["", "", "abe"], ["2", "unknown"]),  # a row without a user is nobody's
        (["abe", "zoë"], ["zoë", "zoë"], ["unknown", "0"]),  # the first row counts
    ],
)
def test_a_row_of_context_finds_its_user(
    tmp_path: Path, suffix: str, users: list[Any], described: list[str], ages: list[str]
) -> None:
    rows = pd.DataFrame({"member": described, "age": range(len(described))})
    context = write(rows, tmp_path / f"members{suffix}")
    table = pd.DataFrame({"member": users, "sku": ["p", "q"]})
    store = make(tmp_path, table, context=context, context_columns=("age",))
    assert store.raw_ids("age")[store.context("age")].tolist() == ages


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        (["1.75", "0.5", "1.25"], [0, 1, 1]),
        (["2024-01-01 00:00:02", "2024-01-01", "2024-01-01 00:00:01.5"], [1704067200, 1704067201, 1704067202]),
        (["7", "3", "0"], [0, 3, 7]),
    ],
)
def test_times_may_be_seconds_or_dates(tmp_path: Path, times: list[str], seconds: list[int]) -> None:
    table = pd.DataFrame({"member": ["a"] * 3, "sku": ["late?", "early?", "mid?"], "at": times})
    store = make(tmp_path, table, time="at")
    assert store.sequence("at").tolist() == seconds


ZONES = {
    "2024-05-31T08:00:00-05:00": 13,
    "2024-05-31 12:00:00+02:00": 10,
    "2024-05-31T11:00:00Z": 11,
    "2024-05-31 14:30:00+0530": 9,
    "2024-05-31 14:00:00 +0200": 12,
    "2024-05-31 10:00:00 -04:00": 14,
    "2024-05-31 17:00:00 Europe/Berlin": 15,
    "2024-05-31 16:00:00": 16,
}
"""Times as text → hour of 31 May 2024 in UTC."""


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_zones_of_times_are_honoured_on_a_machine_of_any_zone(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    hours = [f"{hour:02}" for hour in ZONES.values()]
    table = pd.DataFrame({"member": ["a"] * len(ZONES), "sku": hours, "at": list(ZONES)})
    store = make(tmp_path, table, suffix, time="at")
    assert store.sequence("at").tolist() == [1_717_113_600 + 3600 * hour for hour in sorted(ZONES.values())]
    assert histories(store) == {"a": sorted(hours)}


@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_times_of_parquet_do_not_depend_on_the_zone_of_the_machine(
    zone: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    times = pd.to_datetime([2, 1], unit="s", utc=True)
    table = pd.DataFrame({"member": ["a"] * 2, "sku": ["late", "early"]})
    table["at"] = times.tz_localize(None) if zone is None else times.tz_convert(zone)
    store = make(tmp_path, table, ".parquet", time="at")
    assert store.sequence("at").tolist() == [1, 2]


def test_a_bad_time_with_a_zone_is_shown(tmp_path: Path) -> None:
    table = pd.DataFrame({"member": ["a"], "sku": ["b"], "at": pd.to_datetime(["1969-01-01T00:00:00+02:00"])})
    with pytest.raises(DataError, match=r"row 1: 'at' is 1968-12-31 22:00:00\+00; allowed is seconds since 1970"):
        make(tmp_path, table, ".parquet", time="at")


def test_fractions_of_a_second_order_events_though_seconds_are_stored(tmp_path: Path) -> None:
    table = pd.DataFrame({"member": [1, 1], "sku": ["second", "first"], "at": [5.9, 5.1]})
    assert histories(make(tmp_path, table, ".parquet", time="at")) == {1: ["first", "second"]}


@pytest.mark.parametrize(("suffix", "column"), [(".csv", "member"), (".tsv", "sku"), (".parquet", "member")])
def test_empty_text_is_no_id_in_any_format(suffix: str, column: str, tmp_path: Path) -> None:
    table = pd.DataFrame({"member": ["a", "b", "b"], "sku": ["7", "8", "9"]})
    with pytest.raises(DataError, match=f"'{column}' is empty"):
        make(tmp_path, table.assign(**{column: ["7", "", "8"]}), suffix)
    store = make(tmp_path, table.assign(**{column: ["7", "", "8"]}), suffix, bad_row_policy="skip")
    feature = {"member": "user_id", "sku": "sku"}[column]
    assert store.raw_ids(feature).tolist() == [7, 8], "the other ids are integers, as they would be without it"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"context": "members.csv"}, "--context needs --context_columns"),
        ({"context_columns": ("age",), "bins": {"town": 5}}, "--bins town: 'town' is not among --context_columns"),
        ({"context_columns": ("age",), "bins": {"age": 1}}, "at least 2 ranges are needed"),
        ({"title": "name"}, "--titles, a table of items, and --title, its column, go together"),
        ({"action": "sku"}, "sku would be two features"),
        ({"item": "user_id"}, "cannot be the item"),
        ({"split": "fold", "context_columns": ("fold",)}, "fold would be two features"),
        ({"time_unit": "min"}, "--time_unit min: choose one of s, ms, us, ns"),
        ({"header": ("u", "i", "u")}, "--header u,i,u: each column needs a name of its own"),
        ({"sequences": True, "header": ("user", "item")}, "--header does not go with --sequences"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        own_store(Path(), Path("x.csv"), **({"user": "member", "item": "sku"} | columns))


@pytest.mark.parametrize(("name", "message"), [("ML-1M", "built-in"), ("../up", "names a directory")])
def test_names_that_cannot_be_ones_own_are_refused(tmp_path: Path, name: str, message: str) -> None:
    columns = InteractionColumns(interactions=write(TABLE, tmp_path / "t.csv"), user="member", item="sku")
    with pytest.raises(ConfigError, match=message):
        import_interactions(name, columns, output=tmp_path / "mine")

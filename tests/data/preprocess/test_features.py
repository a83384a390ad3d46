"""Features of items and of events, from users' own tables to the store."""

import logging
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.base.errors import ConfigError, DataError
from hstu.data.datasets.spec import UNKNOWN
from hstu.data.preprocess import write
from hstu.data.preprocess.report import format_report
from hstu.data.store.sequence_store import SequenceStore
from hstu.serve.histories import stored_vocabulary
from scripts.preprocess_dataset import main
from tests.data.own_tables import own_store
from tests.data.preprocess.test_restart import contents, stopped_after_each_stage

EVENTS = """u,i,t,device,price,colour
b,x1,20,phone,9.5,
b,x2,10,web,3,red
a,x1,5,,7,blue
a,x3,7,web,,green
a,x1,9,tv,8,pink
"""
ITEMS = "i,year,genres\nx1,1995,Drama| Comedy\nx3,,\nx9,2001,War\nx2,1994,Drama\n"
BOTH: dict[str, Any] = {
    "item_columns": ("year", "genres", "colour"),
    "event_columns": ("device",),
    "lists": {"genres": "|"},
}


def make(folder: Path, events: str = EVENTS, items: str | Path | None = ITEMS, **given: Any) -> SequenceStore:
    if not (folder / "e.csv").exists():
        (folder / "e.csv").write_text(events)
    if isinstance(items, str):
        if not (folder / "i.csv").exists():
            (folder / "i.csv").write_text(items)
        items = folder / "i.csv"
    interactions = given.pop("interactions", folder / "e.csv")
    return own_store(folder, interactions, **({"time": "t", "items": items} | given))


def write_tables(folder: Path, suffix: str, **tables: pd.DataFrame) -> None:
    for name, table in tables.items():
        file = folder / f"{name}{suffix}"
        table.to_parquet(file) if suffix == ".parquet" else table.to_csv(file, index=False)


def of_items(store: SequenceStore, feature: str) -> dict[Any, Any]:
    """Raw item → raw value, or list of them."""
    codes, offsets = store.item_values(feature)
    raw, items = store.raw_ids(feature), store.raw_ids(store.item_feature).tolist()
    if offsets is None:
        return dict(zip(items, raw[codes].tolist(), strict=True))
    return {item: raw[codes[a:b]].tolist() for item, a, b in zip(items, offsets, offsets[1:], strict=False)}


def of_events(store: SequenceStore, feature: str) -> list[Any]:
    return list(store.raw_ids(feature)[store.sequence(feature)])


def test_without_a_table_of_items_their_columns_are_in_the_events(tmp_path: Path) -> None:
    events = "u,i,t,tags\na,x,2,\na,x,5,b;c\nb,x,3,a;b\n"
    store = make(tmp_path, events, None, item_columns=("tags",), lists={"tags": ";"})
    assert of_items(store, "tags") == {"x": ["a", "b"]}
    assert "items_without_row" not in store.statistics


def test_lists_of_parquet_need_no_separator(tmp_path: Path) -> None:
    frame = pd.DataFrame({"i": ["x1", "x2", "x3"], "tags": [["b", "a", "b"], [], None], "n": [[3], [1, 2], [None, 1]]})
    frame.to_parquet(tmp_path / "i.parquet")
    store = make(tmp_path, items=tmp_path / "i.parquet", item_columns=("tags", "n"))
    assert of_items(store, "tags") == {"x1": ["b", "a", "b"], "x2": [UNKNOWN], "x3": [UNKNOWN]}
    assert of_items(store, "n") == {"x1": ["3"], "x2": ["1", "2"], "x3": ["1"]}


texts = st.sampled_from(["", "a", "b", "C", "é", "10", "9", UNKNOWN])
lists = st.lists(st.sampled_from(["", "a", " b", "Ω", "a b"]), max_size=3).map("|".join)
numbers = st.one_of(st.just(""), st.integers(-5, 20).map(str), st.just("2.50"))
event_rows = st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 9), texts, numbers, texts)


def codes_of(values: "pd.Series[str]") -> tuple[list[int], list[str]]:
    vocabulary = sorted(set(values))
    return [vocabulary.index(value) for value in values], vocabulary


def ranges_of_thirds(values: list[str]) -> list[str]:
    number = [float(value) for value in values if value]
    starts: Any = np.unique(np.quantile(number, [0, 1 / 3, 2 / 3], method="higher")) if number else []
    groups = [[n for n in number if start <= n < end] for start, end in pairwise([*starts, np.inf])]
    names = [f"{min(g):g}" if min(g) == max(g) else f"{min(g):g}..{max(g):g}" for g in groups]
    found = {n: name for g, name in zip(groups, names, strict=True) for n in g}
    return [found[float(value)] if value else UNKNOWN for value in values]


@settings(max_examples=8)
@given(
    st.lists(event_rows, min_size=1, max_size=25),
    st.lists(st.tuples(st.integers(0, 5), texts, lists), max_size=8),
    st.booleans(),
)
def test_any_tables_give_the_store_of_a_plain_reference(rows: list[Any], of_item: list[Any], in_parquet: bool) -> None:
    events = pd.DataFrame(rows, columns=["u", "i", "t", "device", "price", "colour"])
    items = pd.DataFrame([(rows[0][1], "q", "r|s"), *of_item], columns=["i", "year", "tags"])
    with tempfile.TemporaryDirectory() as folder:
        suffix = ".parquet" if in_parquet else ".csv"
        write_tables(Path(folder), suffix, e=events, i=items)
        store = own_store(
            Path(folder), Path(folder) / f"e{suffix}", time="t", items=Path(folder) / f"i{suffix}",
            item_columns=("year", "tags", "colour"), event_columns=("device", "price"), lists={"tags": "|"},
            bins={"price": 3},
        )  # fmt: skip
        store.verify_contents()

    ordered = events.sort_values(["u", "t"], kind="stable")
    prices = ordered.price.tolist()
    assert of_events(store, "price") == ranges_of_thirds(prices)
    served = stored_vocabulary(store, "price").places([price or UNKNOWN for price in prices])
    assert served.tolist() == store.sequence("price").tolist()
    codes, vocabulary = codes_of(ordered.device.replace("", UNKNOWN))
    assert store.sequence("device").tolist() == codes and store.raw_ids("device").tolist() == vocabulary
    ids = sorted(set(events.i))
    first = items.drop_duplicates("i").set_index("i").reindex(ids).fillna("").replace("", UNKNOWN)
    codes, vocabulary = codes_of(first.year)
    assert store.item_values("year")[0].tolist() == codes and store.raw_ids("year").tolist() == vocabulary
    tags = [[tag.strip() for tag in text.split("|") if tag.strip()] or [UNKNOWN] for text in first.tags]
    assert list(of_items(store, "tags").values()) == tags
    assert store.raw_ids("tags").tolist() == sorted({tag for row in tags for tag in row})
    by_time = events.sort_values("t", kind="stable").query("colour != ''").drop_duplicates("i").set_index("i").colour
    assert list(of_items(store, "colour").values()) == by_time.reindex(ids).fillna(UNKNOWN).tolist()


# --- what goes with the other options --------------------------------------------------------------------------------


def test_the_command_line_takes_the_same_and_records_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.csv").write_text(EVENTS)
    (tmp_path / "i.csv").write_text('i,year,genres\nx1,1995,"Drama, Comedy"\nx3,,\nx9,2001,War\nx2,1994,Drama\n')
    command = ["--dataset_name", "mine", "--interactions", str(tmp_path / "e.csv"), "--user", "u", "--item", "i"]
    command += ["--time", "t", "--items", str(tmp_path / "i.csv")]
    command += ["--item_columns", "year,genres", "--lists", "genres=comma"]
    command += ["--event_columns", "device,price", "--bins", "price=2", "--output", str(tmp_path / "store")]
    assert main(command) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "features of items: year (3), genres (3, 1.3 per item)" in told
    assert "features of events: device (4), price (3)" in told
    store = SequenceStore.open(tmp_path / "store")
    assert of_items(store, "genres")["x1"] == ["Drama", "Comedy"]
    assert store.command is not None and "--lists genres=comma" in store.command
    assert main(command) == 0  # it is kept
    assert main([*command, "--lists", "genres=;"]) == 3
    assert "--lists was genres=comma, it is now genres=;" in capsys.readouterr().err


def test_append_reads_the_table_of_items_again(tmp_path: Path) -> None:
    make(tmp_path, **BOTH)
    (tmp_path / "june.csv").write_text("u,i,t,device,price,colour\nc,x9,1,fridge,1,gold\n")
    (tmp_path / "i.csv").write_text(ITEMS.replace("1994", "1894"))
    added: dict[str, Any] = {"time": "t", "append": True, **BOTH}
    store = own_store(tmp_path, tmp_path / "june.csv", items=tmp_path / "i.csv", **added)
    assert of_items(store, "year") == {"x1": "1995", "x2": "1894", "x3": UNKNOWN, "x9": "2001"}
    assert of_events(store, "device")[-1] == "fridge"
    (tmp_path / "july.csv").write_text("u,i,t,device,price,colour\nc,x8,1,,1,red\n")
    store = own_store(tmp_path, tmp_path / "july.csv", **added)
    assert of_items(store, "year") == {"x1": "1995", "x2": "1894", "x3": UNKNOWN, "x8": UNKNOWN, "x9": "2001"}


def test_filters_and_all_items(tmp_path: Path) -> None:
    assert of_items(make(tmp_path, min_item_events=2, **BOTH), "colour") == {"x1": "blue"}
    (tmp_path / "all").mkdir()
    store = make(tmp_path / "all", all_items=True, **BOTH)
    assert of_items(store, "genres")["x9"] == ["War"] and of_items(store, "colour")["x9"] == UNKNOWN
    assert store.cardinality("i") == 4


def test_a_run_stopped_after_any_stage_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    options: dict[str, Any] = BOTH | {"event_columns": ("device", "price"), "bins": {"price": 2}}
    expected = contents(make(tmp_path / "a", **options).path)
    monkeypatch.setattr(write, "_SORT_BYTES_PER_ROW", 4 * 10**9 // 2)  # a bucket of two events
    found, stages = stopped_after_each_stage(monkeypatch, lambda: make(tmp_path / "a", force=True, **options))
    assert {"item_table", "typed", "vocabulary_e0", "ranges e1", "events from 1"} <= set(stages)
    assert contents(found.path) == expected


# --- mistakes --------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a table without columns": ({"item_columns": ()}, "--items needs --item_columns"),
    "the action as a feature": ({"action": "price", "event_columns": ("price",)}, r"column\(s\) price would be two"),
    "a feature twice": ({"item_columns": ("year", "year")}, r"column\(s\) year would be two features"),
    "a feature of items and events": ({"event_columns": ("year",)}, r"column\(s\) year would be two features"),
    "the users' name": ({"event_columns": ("user_id",)}, "'user_id' is the name of the users"),
    "a list that is no feature": ({"lists": {"tags": "|"}}, "'tags' is not among --item_columns"),
    "a list of an event": (
        {"event_columns": ("device",), "lists": {"device": "|"}},
        "--lists device: 'device' is not among --item_columns; only items have lists",
    ),
    "no separator": ({"lists": {"year": ""}}, "say what separates the values"),
    "ranges of a list": ({"lists": {"year": "|"}, "bins": {"year": 3}}, "'year' is among --bins, too"),
    "ranges of no feature": ({"bins": {"price": 3}}, "'price' is not among --context_columns, --item_columns or"),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_that_do_not_go_together_are_refused(case: str, tmp_path: Path) -> None:
    given, message = WRONG[case]
    with pytest.raises(ConfigError, match=message.replace("|:", r"\|:")):
        make(tmp_path, **({"item_columns": ("year",)} | given))
    assert not (tmp_path / "store").exists()


BAD_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "an absent event column": ({"event_columns": ("divice",)}, r"e\.csv has no column 'divice'.*mean 'device'"),
    "no item column": ({"item_columns": ("yaer",)}, r"i\.csv has no column 'yaer'.*mean 'year'"),
    "one absent item column": ({"item_columns": ("year", "yaer")}, r"e\.csv has no column 'yaer'"),
    "a table of other items": (
        {"items": "i,year\ny7,3\n", "item_columns": ("year",)},
        r"no row for any of the 3 items of the events: it has items such as 'y7', the events have items such as 'x1'",
    ),
    "ranges of text": (
        {"event_columns": ("device",), "bins": {"device": 3}},
        "--bins device=3: not all values are finite numbers, such as 'phone'",
    ),
    "ranges of infinity": (
        {"items": "i,year\nx1,3\nx2,inf\n", "item_columns": ("year",), "bins": {"year": 3}},
        "--bins year=3: not all values are finite numbers, such as 'inf'",
    ),
    "too few columns": ({"items": "i,year\nx1\n", "item_columns": ("year",)}, r"i\.csv:2: expected columns: 2"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_does_not_fit_is_refused_and_nothing_is_left(case: str, tmp_path: Path) -> None:
    given, message = BAD_DATA[case]
    with pytest.raises(DataError, match=message) as raised:
        make(tmp_path, **({"item_columns": ("year",)} | given))
    assert "\n" not in str(raised.value)
    assert not [path.name for path in tmp_path.iterdir() if "store" in path.name]


def test_parquet_columns_that_are_no_categories_are_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame({"u": ["a"], "i": ["x"], "t": [1], "vector": [[0.5, 0.25]], "tags": [["p", "q"]]})
    frame.to_parquet(tmp_path / "p.parquet")
    base: dict[str, Any] = {"interactions": tmp_path / "p.parquet", "items": None}
    with pytest.raises(DataError, match=r"'vector' is DOUBLE\[\], vectors"):
        make(tmp_path, **base, item_columns=("vector",))
    with pytest.raises(DataError, match=r"'tags' is VARCHAR\[\], and an event has one value"):
        make(tmp_path, **base, event_columns=("tags",))
    with pytest.raises(DataError, match=r"'tags' is VARCHAR\[\], a list by itself; leave it out of --lists"):
        make(tmp_path, **base, item_columns=("tags",), lists={"tags": "|"})
    with pytest.raises(DataError, match=r"'vector' is DOUBLE\[\], which is a vector; name it in --vectors"):
        make(tmp_path, **base, item_columns=("vector",), numbers=("vector",))
    with pytest.raises(DataError, match=r"'t' is BIGINT, which is no vector; name it in --numbers"):
        make(tmp_path, **(base | {"time": None}), item_columns=("t",), vectors=("t",))
    assert of_items(make(tmp_path, **base, item_columns=("tags",)), "tags") == {"x": ["p", "q"]}


def test_items_without_a_row_are_counted_and_the_first_row_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = "i,year\nx1,1995\nx1,1996\nx2,1994\nx2,1994\n,5\n"
    with caplog.at_level(logging.WARNING, logger="hstu"):
        store = make(tmp_path, items=items, item_columns=("year",))
    assert of_items(store, "year") == {"x1": "1995", "x2": "1994", "x3": UNKNOWN}
    assert 'i.csv has no row for 1 of 3 items: their features are "unknown"' in caplog.text
    assert store.statistics["items_without_row"] == 1
    assert "features of items: year (3)\n  items without row 1" in format_report(store)

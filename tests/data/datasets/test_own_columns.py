"""What the columns of users' own tables may hold: labels as actions, context in the events, quantities, titles."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hstu.base.errors import DataError
from hstu.data.preprocess.features import ranges_of
from hstu.data.store.sequence_store import SequenceStore
from scripts.preprocess_dataset import main
from tests.data.datasets.test_own_files import make, write

SHOP = "u,i,a,t,town\n1,7,view,30,Rom\n1,8,buy,10,\n1,9,view,20,Ulm\n2,7,cart,5,Bonn\n3,7,view,5,\n"


def context_of(store: SequenceStore, feature: str) -> list[str]:
    return list(store.raw_ids(feature)[store.context(feature)])


# --- actions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_texts_as_actions_become_labels(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / "e.csv", SHOP)
    if suffix == ".parquet":
        pd.read_csv(file).to_parquet(tmp_path / "e.parquet")
    store = make(tmp_path, tmp_path / f"e{suffix}", action="a", time="t")
    assert store.raw_ids("a").tolist() == ["buy", "cart", "view"]
    assert store.sequence("a").tolist() == [0, 2, 2, 1, 2]
    assert store.cardinality("a") == 3
    assert store.encode("a", ["view", "buy"]).tolist() == [2, 0]


def test_texts_without_end_are_no_actions(tmp_path: Path) -> None:
    rows = "".join(f"1,7,review {n}\n" for n in range(300))
    with pytest.raises(DataError, match="'a' has more than 256 different texts, such as 'review 0'"):
        make(tmp_path, write(tmp_path / "e.csv", f"u,i,a\n{rows}"), action="a")


# --- context -------------------------------------------------------------------------------------------------------


def test_context_in_the_events_is_that_of_the_first_event_with_a_value(tmp_path: Path) -> None:
    file = write(tmp_path / "e.csv", SHOP)
    store = make(tmp_path, file, time="t", context_columns=("town",))
    assert context_of(store, "town") == ["Ulm", "Bonn", "unknown"], "later values would show the future"
    store = make(tmp_path / "without_times", file, context_columns=("town", "u"))
    assert context_of(store, "town") == ["Rom", "Bonn", "unknown"]
    assert store.contextual_features == ("town", "user_id")


def test_context_may_come_from_both_tables(tmp_path: Path) -> None:
    users = write(tmp_path / "users.csv", "u,age,sex\n2,40,f\n1,30,m\n")
    store = make(
        tmp_path,
        [write(tmp_path / "e.csv", SHOP), write(tmp_path / "f.csv", SHOP.replace("2,7,cart,5", "2,7,cart,1"))],
        time="t",
        context=users,
        context_columns=("sex", "town", "age"),
    )
    assert store.contextual_features == ("sex", "town", "age")
    assert [context_of(store, name) for name in store.contextual_features] == [
        ["m", "f", "unknown"],
        ["Ulm", "Bonn", "unknown"],
        ["30", "40", "unknown"],
    ]


def test_a_context_column_of_no_table_is_reported(tmp_path: Path) -> None:
    events, users = write(tmp_path / "e.csv", SHOP), write(tmp_path / "users.csv", "u,age\n1,30\n")
    with pytest.raises(DataError, match=r"e\.csv has no column 'twon'. Did you mean 'town'"):
        make(tmp_path, events, context_columns=("twon",))
    with pytest.raises(DataError, match=r"users\.csv has no column 'town'"):
        make(tmp_path, events, context=users, context_columns=("town",))


def test_many_numbers_as_categories_are_not_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "".join(f"{user},7,{user}.5,t{user}\n" for user in range(401))
    file = write(tmp_path / "e.csv", f"u,i,income,text\n{rows}")
    with caplog.at_level(logging.WARNING, logger="hstu"):
        store = make(tmp_path, file, context_columns=("income", "text"))
    assert store.cardinality("income") == 401
    (message,) = (record.getMessage() for record in caplog.records)
    assert "'income' has 401 different numbers" in message and "--bins income=10" in message
    caplog.clear()
    store = make(tmp_path / "binned", file, context_columns=("income",), bins={"income": 4})
    assert not caplog.records
    counts = dict(zip(store.raw_ids("income"), np.bincount(store.context("income")), strict=True))
    assert counts == {"0.5..99.5": 100, "100.5..199.5": 100, "200.5..299.5": 100, "300.5..400.5": 101}


def test_ranges_keep_equal_numbers_together_and_have_names_of_their_own() -> None:
    assert ranges_of(np.array([1.0, 2, 30]), np.array([4, 1, 1]), 3) == {"1": 1, "2..30": 2}
    large = 1e9 + np.arange(4)
    expected = {"1000000000..1000000001": 1e9, "1000000002..1000000003": 1e9 + 2}
    assert ranges_of(large, np.ones(4, dtype=int), 2) == expected
    assert ranges_of(np.array([]), np.array([]), 3) == {}


# --- titles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [["7", "8", "9"], ["A7", "ä8", "9,5"]])
def test_titles_come_from_a_table_of_items(tmp_path: Path, ids: list[str]) -> None:
    events = pd.DataFrame({"u": [1, 1, 2], "i": ids})
    items = pd.DataFrame({"name": ["Größe, 1", "B", "late", "gone"], "i": [ids[2], ids[0], ids[0], "x"]})
    events.to_csv(tmp_path / "e.csv", index=False)
    items.to_csv(tmp_path / "items.csv", index=False)
    store = make(tmp_path, tmp_path / "e.csv", titles=tmp_path / "items.csv", title="name")
    titles = store.titles()
    assert titles is not None
    found = dict(zip(map(str, store.raw_ids("i")), titles, strict=True))
    assert found == {ids[0]: "B", ids[1]: "", ids[2]: "Größe, 1"}, "the first row of an item counts"
    assert sorted(store.sources) == ["e.csv", "items.csv"]


def test_the_command_takes_it_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("e.csv"), SHOP.replace("town", "price").replace("Rom", "3.5").replace("Ulm", "9").replace("Bonn", "1"))
    write(Path("items.csv"), "i,name\n7,A\n9,B\n")
    command = ["--dataset_name", "all", "--interactions", "e.csv", "--user", "u", "--item", "i", "--action", "a"]
    command += ["--time", "t", "--context_columns", "price", "--bins", "price=2", "--titles", "items.csv"]
    assert main([*command, "--title", "name"]) == 0
    store = SequenceStore.open("tmp_data/all")
    assert context_of(store, "price") == ["9", "1", "unknown"]
    titles = store.titles()
    assert titles is not None and titles.tolist() == ["A", "", "B"]
    assert store.command is not None and "--bins price=2" in store.command
    with pytest.raises(SystemExit):
        main([*command, "--bins", "price=many"])
    assert "expected columns and numbers of ranges" in capsys.readouterr().err

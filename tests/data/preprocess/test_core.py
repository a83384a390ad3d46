"""k-core filters: what is left has enough events, and nothing that has enough is left out."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hstu.base.errors import ConfigError, DataError
from hstu.data.store.sequence_store import SequenceStore
from scripts.preprocess_dataset import main
from tests.data.own_tables import histories, own_store


def make(folder: Path, table: pd.DataFrame, **limits: Any) -> SequenceStore:
    folder.mkdir(exist_ok=True)
    table.to_csv(folder / "e.csv", index=False)
    return own_store(folder, folder / "e.csv", time="t", store="mine", **limits)


def core(table: pd.DataFrame, users: int, items: int) -> pd.DataFrame:
    """The same filter, one pass after another."""
    while True:
        kept = table[table.groupby("u").i.transform("size") >= users]
        kept = kept[kept.groupby("i").u.transform("size") >= items]
        if len(kept) == len(table):
            return kept
        table = kept


@pytest.mark.parametrize(("users", "items"), [(3, 3), (5, 1), (1, 4)])
def test_what_is_left_is_the_core(tmp_path: Path, users: int, items: int) -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"u": rng.integers(0, 60, 250), "i": rng.zipf(1.4, 250) % 90, "t": rng.permutation(250)})
    expected = core(table, users, items)
    assert 0 < len(expected) < len(table)
    store = make(tmp_path, table, min_user_events=users, min_item_events=items)
    ordered = expected.sort_values(["u", "t"])
    assert histories(store) == {user: rows.i.tolist() for user, rows in ordered.groupby("u")}
    assert sorted(store.raw_ids("i").tolist()) == sorted(expected.i.unique())


def test_filters_are_part_of_the_command_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("e.csv").write_text("u,i\n" + "a,1\na,2\nb,1\nb,2\nc,3\n")
    command = ["--dataset_name", "mine", "--interactions", "e.csv", "--user", "u", "--item", "i"]
    with caplog.at_level(logging.INFO, logger="hstu"):
        assert main([*command, "--min_user_events", "2"]) == 0
    assert "4 of 5 events are left" in caplog.text
    store = SequenceStore.open("tmp_data/mine")
    assert (store.num_users, store.num_events) == (2, 4)
    assert store.command is not None and "--min_user_events 2" in store.command
    assert main(command) == 3, "the store does not fit a command without the filter"


def test_filters_that_leave_nothing_or_mean_nothing_are_refused(tmp_path: Path) -> None:
    table = pd.DataFrame({"u": [1, 2], "i": [1, 2], "t": [1, 2]})
    with pytest.raises(DataError, match="--min_user_events 2 --min_item_events 1 leave no event of 2"):
        make(tmp_path, table, min_user_events=2)
    assert not (tmp_path / "mine").exists()
    with pytest.raises(ConfigError, match="--min_item_events 0: at least 1"):
        make(tmp_path, table, min_item_events=0)

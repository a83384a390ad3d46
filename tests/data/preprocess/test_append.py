"""--append: the events of new files join an existing store, which then is the store of all files together."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hstu.base.errors import ConfigError, DataError
from hstu.base.files import Journal
from hstu.data.store.sequence_store import SequenceStore
from scripts.preprocess_dataset import main
from tests.data.own_tables import histories, own_store
from tests.data.preprocess.test_restart import contents

MAY = "u,i,a,t,part\nb,x3,view,10,train\nb,x1,buy,20,train\nd,x3,view,5,test\n"
JUNE = "part,i,u,t,a\ntrain,x2,b,15,view\ntest,x9,b,30,buy\ntrain,x0,a,7,buy\ntest,x3,e,8,view\n"
USERS = "u,town\nb,Ulm\nd,Rom\n"
COLUMNS: dict[str, Any] = {"user": "u", "item": "i", "action": "a", "time": "t", "split": "part"}


def make(folder: Path, *files: str, store: str = "store", **given: Any) -> Path:
    return own_store(folder, [folder / file for file in files], store=store, **(COLUMNS | given)).path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {"may.csv": MAY, "june.csv": JUNE, "users.csv": USERS}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_store_is_that_of_all_files_together(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(folder, "may.csv")
    with caplog.at_level(logging.INFO, logger="hstu"):
        appended = make(folder, "june.csv", append=True)
    assert f"added to {appended}: 4 events" in caplog.text
    assert contents(appended) == contents(make(folder, "may.csv", "june.csv", store="at_once"))
    store = SequenceStore.open(appended)
    assert histories(store) == {"a": ["x0"], "b": ["x3", "x2", "x1", "x9"], "d": ["x3"], "e": ["x3"]}
    assert list(store.sources) == ["may.csv", "june.csv"]
    make(folder, "may.csv", "june.csv")  # it is kept


def test_append_after_append(folder: Path) -> None:
    (folder / "july.csv").write_text("u,i,a,t,part\nc,x5,buy,99,train\n")
    make(folder, "may.csv")
    for file in ("june.csv", "july.csv"):
        make(folder, file, append=True)
    expected = make(folder, "may.csv", "june.csv", "july.csv", store="at_once")
    assert contents(folder / "store") == contents(expected)


def test_files_that_are_in_the_store_are_not_added_twice(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make(folder, "may.csv")
    before = contents(store)
    shutil.copy(folder / "may.csv", folder / "copy.csv")
    with caplog.at_level(logging.INFO, logger="hstu"):
        make(folder, "copy.csv", append=True)
    assert f"copy.csv is in {store} already, as {folder / 'may.csv'}" in caplog.text
    assert "has all of these files already, and is kept" in caplog.text and contents(store) == before
    make(folder, "may.csv", "june.csv", append=True)
    assert contents(store) == contents(make(folder, "may.csv", "june.csv", store="at_once"))


def test_tables_of_users_are_read_anew(folder: Path) -> None:
    with_users: dict[str, Any] = {"context": folder / "users.csv", "context_columns": ("u", "town")}
    make(folder, "may.csv", **with_users)
    (folder / "users.csv").write_text(f"{USERS}a,Bonn\n")
    store = make(folder, "june.csv", append=True, **with_users)
    assert contents(store) == contents(make(folder, "may.csv", "june.csv", store="at_once", **with_users))
    assert SequenceStore.open(store).raw_ids("town").tolist() == ["Bonn", "Rom", "Ulm", "unknown"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": None}, "--time was t, it is now not given"),
        ({"item": "a", "action": None}, "--action was a, it is now not given; --item was i, it is now a"),
        ({"min_item_events": 2}, "--min_item_events was not given, it is now 2"),
        ({"context_columns": ("u",)}, "--context_columns was not given, it is now u"),
    ],
)
def test_other_columns_and_options_are_refused_by_name(change: dict[str, Any], message: str, folder: Path) -> None:
    before = contents(make(folder, "may.csv"))
    with pytest.raises(DataError, match=f"cannot append to .*store: {message}. Give the options that it was made with"):
        make(folder, "june.csv", append=True, **change)
    assert contents(folder / "store") == before


def test_a_table_that_is_left_out_is_refused(folder: Path) -> None:
    make(folder, "may.csv", context=folder / "users.csv", context_columns=("town",))
    (folder / "june.csv").write_text(JUNE.replace("part,", "town,part,", 1).replace("\nt", "\nUlm,t"))
    with pytest.raises(DataError, match=r"--context was .*users\.csv, it is now not given"):
        make(folder, "june.csv", append=True, context_columns=("town",))


@pytest.mark.parametrize(
    ("text", "message"), [(None, "is not there"), (f"{MAY}f,x1,buy,1,train\n", "has changed since")]
)
def test_earlier_raw_files_must_be_as_they_were(folder: Path, text: str | None, message: str) -> None:
    before = contents(make(folder, "may.csv"))
    (folder / "may.csv").unlink() if text is None else (folder / "may.csv").write_text(text)
    with pytest.raises(
        DataError, match=rf"raw files that it was made of are read again, and .*may\.csv {message}. Put"
    ):
        make(folder, "june.csv", append=True)
    assert contents(folder / "store") == before


def test_there_must_be_a_store(folder: Path) -> None:
    with pytest.raises(DataError, match=r"there is no store at .*store; make it first, without --append"):
        make(folder, "june.csv", append=True)
    with pytest.raises(ConfigError, match="leave out one of them"):
        make(folder, "june.csv", append=True, force=True)


def test_a_kill_leaves_the_earlier_store_and_the_same_command_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(make(folder, "may.csv"))
    commit, starts, left = Journal.commit, 0, 0

    def stop_later(journal: Journal, stage: str, result: object = None) -> None:
        nonlocal left
        commit(journal, stage, result)
        left -= 1
        if not left:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "commit", stop_later)
    while contents(folder / "store") == before:
        starts, left = starts + 1, starts + 1
        try:
            make(folder, "june.csv", append=True)
        except KeyboardInterrupt:
            assert contents(folder / "store") == before
    assert starts > 3
    monkeypatch.undo()
    assert contents(folder / "store") == contents(make(folder, "may.csv", "june.csv", store="at_once"))


def test_a_bad_row_of_a_new_file_leaves_the_store(folder: Path) -> None:
    before = contents(make(folder, "may.csv"))
    (folder / "june.csv").write_text(f"{JUNE}train,,b,9,view\n")
    with pytest.raises(DataError, match=r"june\.csv:6: 'i' is empty"):
        make(folder, "june.csv", append=True)
    assert contents(folder / "store") == before


def test_what_earlier_models_misread_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "ages.csv").write_text("u,age\nb,10\nd,20\na,30\ne,90\n")
    users: dict[str, Any] = {"context": folder / "ages.csv", "context_columns": ("age",), "bins": {"age": 2}}
    make(folder, "may.csv", **users)
    (folder / "june.csv").write_text(JUNE.replace("view", "cart"))
    make(folder, "june.csv", append=True, **users)
    assert "'a' was buy, view, and is buy, cart, view now: models of the earlier data take its values" in caplog.text
    assert "'age' was 10, 20, and is 10..20, 30..90 now" in caplog.text
    caplog.clear()
    pd.DataFrame({"u": [1, 2], "i": [1, 2]}).to_csv(folder / "numbers.csv", index=False)
    (folder / "texts.csv").write_text("u,i\n3,x\n")
    plain: dict[str, Any] = dict.fromkeys(("action", "time", "split"))
    make(folder, "numbers.csv", store="ids", **plain)
    make(folder, "texts.csv", store="ids", append=True, **plain)
    assert "'i' was integers, and is text now" in caplog.text and "'user_id'" not in caplog.text


def test_the_command_appends(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    command = ["--dataset_name", "mine", "--user", "u", "--item", "i", "--time", "t", "--action", "a"]
    assert main([*command, "--interactions", "may.csv"]) == 0
    assert main([*command, "--interactions", "june.csv"]) == 3
    told = capsys.readouterr().err
    assert "it was made without june.csv" in told
    assert "To make it again, add --force; to add the events of further files to it, --append; to make another" in told
    assert main([*command, "--interactions", "june.csv", "--append"]) == 0
    assert "users 4, items 5, events 7" in capsys.readouterr().out
    assert main([*command, "--interactions", "may.csv", "june.csv"]) == 0, "it is kept"
    assert main(["--dataset_name", "ml-1m", "--append"]) == 2
    assert "--append: only with --interactions" in capsys.readouterr().err

"""A store that exists is kept if it fits the command and its raw files; else the command says what differs."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hstu.base.errors import DataError
from hstu.data.preprocess import preprocess
from hstu.data.store.sequence_store import SequenceStore
from tests.data.own_tables import own_store

TABLE = pd.DataFrame({"u": [1, 1, 2], "i": [7, 8, 7], "j": [1, 2, 3], "a": [0, 1, 2], "t": [3, 2, 1]})
USERS = pd.DataFrame({"u": [1, 2], "town": ["Ulm", "Rom"]})


def make(folder: Path, **given: Any) -> None:
    own_store(folder, given.pop("interactions", folder / "events.csv"), **({"time": "t"} | given))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TABLE.to_csv(tmp_path / "events.csv", index=False)
    USERS.to_csv(tmp_path / "users.csv", index=False)
    make(tmp_path)
    return tmp_path


def test_a_store_that_fits_is_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = (folder / "store" / "meta.json").stat().st_ino
    make(folder)
    assert (folder / "store" / "meta.json").stat().st_ino == before
    assert "exists, fits its raw files and is kept; --force replaces it" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item": "j"}, r"--item was i, it is now j\. To make it again, add --force"),
        ({"action": "a"}, "--action was not given, it is now a"),
        ({"time": None}, "--time was t, it is now not given"),
        ({"name": "other"}, "--dataset_name was mine, it is now other"),
        ({"bad_row_policy": "skip"}, "--bad_row_policy was not given, it is now skip"),
        ({"item": "j", "action": "a"}, "--action was not given, it is now a; --item was i, it is now j"),
        ({"context_columns": ("u",)}, "--context_columns was not given, it is now u"),
        (
            {"interactions": Path("copy.csv")},
            r"it was made without .*copy\.csv; it was made from events\.csv, which is not given",
        ),
    ],
)
def test_another_command_is_refused_and_says_what_differs(
    change: dict[str, Any], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    TABLE.to_csv(folder / "copy.csv", index=False)
    with pytest.raises(DataError, match=f"exists and does not fit this command: {message}"):
        make(folder, **change)
    assert SequenceStore.open(folder / "store").item_feature == "i"


def test_a_changed_raw_file_is_noticed(folder: Path) -> None:
    TABLE.assign(i=[7, 8, 9]).to_csv(folder / "events.csv", index=False)
    with pytest.raises(DataError, match=r"events\.csv has changed since"):
        make(folder)


def test_a_table_of_users_that_is_added_or_changed_is_noticed(folder: Path) -> None:
    with_users: dict[str, Any] = {"context": folder / "users.csv", "context_columns": ("town",)}
    with pytest.raises(DataError, match=r"--context_columns was not given, it is now town; .*without .*users\.csv"):
        make(folder, **with_users)
    (folder / "store").rename(folder / "old")
    make(folder, **with_users)
    USERS.assign(town="Ulm").to_csv(folder / "users.csv", index=False)
    with pytest.raises(DataError, match=r"users\.csv has changed since"):
        make(folder, **with_users)


def test_several_files_are_compared_with_their_order(folder: Path) -> None:
    two = [folder / name for name in ("events.csv", "more.csv")]
    TABLE.assign(u=5).to_csv(two[1], index=False)
    with pytest.raises(DataError, match=r"it was made without .*more\.csv\. To make it again"):
        make(folder, interactions=two)
    (folder / "store").rename(folder / "old")
    make(folder, interactions=two)
    make(folder, interactions=two)
    with pytest.raises(DataError, match=r"the raw files were in another order: events\.csv, more\.csv"):
        make(folder, interactions=two[::-1])


def test_the_same_files_elsewhere_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    make(Path())
    make(folder, interactions=Path("..", folder.name, "events.csv"))


def raw_files(folder: Path) -> dict[str, Any]:
    """Where a small ml-100k is, and where its store goes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "u.data").write_text("1\t2\t3\t4\n")
    (folder / "u.user").write_text("1|20|M|other|1\n")
    return {"raw_path": folder, "output": folder / "store"}


def test_a_file_of_a_built_in_dataset_that_changes_comes_or_goes_is_noticed(tmp_path: Path) -> None:
    place = raw_files(tmp_path)
    assert SequenceStore.open(preprocess("ml-100k", **place)).titles() is None
    preprocess("ml-100k", **place)
    (tmp_path / "u.item").write_text(f"2|Film (1990)|||{'|0' * 19}\n")
    with pytest.raises(DataError, match=r"it was made without .*u\.item\. To make it again, add --force"):
        preprocess("ml-100k", **place)
    store = SequenceStore.open(preprocess("ml-100k", force=True, **place))
    assert store.titles() is not None and store.item_side_features == ("year", "genres")
    (tmp_path / "u.item").unlink()
    (tmp_path / "u.data").write_text("1\t2\t4\t4\n")
    with pytest.raises(DataError, match=r"u\.data has changed since; it was made from u\.item, which is not given now"):
        preprocess("ml-100k", **place)


def test_a_built_in_dataset_without_its_raw_files_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = Path("tmp_data", "raw", "ml-100k")
    raw_files(raw)
    preprocess("ml-100k")
    (raw / "u.data").unlink()
    preprocess("ml-100k")
    assert "could not be compared with raw files, as there are none, and is kept" in caplog.text

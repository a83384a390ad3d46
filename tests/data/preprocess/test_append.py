"""--append: the events of new files join an existing store, which then is the store of all files together."""

import logging
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hstu.base.errors import ConfigError, DataError
from hstu.data.preprocess import forget
from hstu.data.store import writer
from hstu.data.store.sequence_store import SequenceStore
from scripts.preprocess_dataset import main
from tests.conftest import REPOSITORY
from tests.data.own_tables import histories, own_store
from tests.data.preprocess.test_restart import arrays, contents, stopped_after_each_stage

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


def test_a_store_in_shards_stays_in_shards(folder: Path) -> None:
    at_once = SequenceStore.open(make(folder, "may.csv", "june.csv", store="at_once"))
    made = make(folder, "may.csv", shards=3)
    assert SequenceStore.open(made).num_shards == 2, "there are no more users"
    with pytest.raises(DataError, match=r"--shards was 3, it is now not given"):
        make(folder, "june.csv", append=True)
    grown = SequenceStore.open(make(folder, "june.csv", append=True, shards=3))
    grown.verify_contents()
    assert grown.num_shards == 3 and "--shards 3" in str(grown.command)
    assert grown.lineage[-1] == at_once.lineage[-1] and histories(grown) == histories(at_once)
    (folder / "gone.txt").write_text("b\n")
    less = [SequenceStore.open(forget("mine", folder / "gone.txt", output=each.path)) for each in (grown, at_once)]
    less[0].verify_contents()
    assert [each.num_shards for each in less] == [3, 0] and "--shards 3" in str(less[0].command)
    assert less[0].lineage[-1] == less[1].lineage[-1] and histories(less[0]) == histories(less[1])
    with pytest.raises(ConfigError, match="--shards 0: from 1"):
        make(folder, "may.csv", store="none", shards=0)


def test_tables_of_users_are_read_anew(folder: Path) -> None:
    with_users: dict[str, Any] = {"context": folder / "users.csv", "context_columns": ("u", "town")}
    make(folder, "may.csv", **with_users)
    (folder / "users.csv").write_text(f"{USERS}a,Bonn\n")
    store = make(folder, "june.csv", append=True, **with_users)
    assert contents(store) == contents(make(folder, "may.csv", "june.csv", store="at_once", **with_users))
    assert SequenceStore.open(store).raw_ids("town").tolist() == ["Bonn", "Rom", "Ulm", "unknown"]


def test_a_table_alone_is_no_append(folder: Path) -> None:
    with_users: dict[str, Any] = {"context": folder / "users.csv", "context_columns": ("town",)}
    before = contents(make(folder, "may.csv", **with_users))
    make(folder, "may.csv", append=True, **with_users)
    (folder / "users.csv").write_text(f"{USERS}a,Bonn\n")
    with pytest.raises(DataError, match=r"users\.csv is not as in the store, and no events are new"):
        make(folder, "may.csv", append=True, **with_users)
    assert contents(folder / "store") == before


def test_an_append_starts_without_torch_and_pandas(tmp_path: Path) -> None:
    """Each takes longer than many appends."""
    for name, rows in (("a", "9,10,1\n10,9,0\n"), ("b", "9,7,3\n8,10,0\n")):
        (tmp_path / f"{name}.csv").write_text(f"u,i,a\n{rows}")
    own_store(tmp_path, tmp_path / "a.csv", action="a")
    append = f"--dataset_name mine --output {tmp_path}/store --interactions {tmp_path}/b.csv --append"
    append += " --user u --item i --action a"
    program = "import sys; from scripts import preprocess_dataset as p; print(p.main(sys.argv[1:]), *sys.modules)"
    command = [sys.executable, "-c", program, *append.split()]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert told.startswith("0 ") and not {"torch", "pandas"} & {*told.split()}
    expected = own_store(tmp_path, [tmp_path / "a.csv", tmp_path / "b.csv"], action="a", store="at_once")
    assert contents(tmp_path / "store") == contents(expected.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item": "a", "action": None}, "--action was a, it is now not given; --item was i, it is now a"),
        ({"min_item_events": 2}, "--min_item_events was not given, it is now 2"),
        ({"title": "i", "titles": "may.csv"}, "--title was not given, it is now i"),
    ],
)
def test_other_columns_and_options_are_refused_by_name(change: dict[str, Any], message: str, folder: Path) -> None:
    before = contents(make(folder, "may.csv"))
    with pytest.raises(DataError, match=f"cannot append to .*store: {message}. Give the options that it was made with"):
        make(folder, "june.csv", append=True, **change)
    assert contents(folder / "store") == before


def test_a_table_that_is_left_out_stays(folder: Path) -> None:
    users: dict[str, Any] = {"context": folder / "users.csv", "context_columns": ("town",)}
    make(folder, "may.csv", **users)
    (folder / "users.csv").unlink()
    store = SequenceStore.open(make(folder, "june.csv", append=True, context_columns=("town",)))
    towns = store.raw_ids("town")[store.context("town")]
    assert dict(zip(store.raw_ids("user_id"), towns, strict=True)) == {
        "a": "unknown", "b": "Ulm", "d": "Rom", "e": "unknown",
    }  # fmt: skip
    assert list(store.sources) == ["may.csv", "june.csv", "users.csv"] and "users.csv" in str(store.command)
    (folder / "july.csv").write_text("u,i,a,t,part,town\na,x3,buy,99,test,Bonn\nb,x3,buy,99,test,Bonn\n")
    store = SequenceStore.open(make(folder, "july.csv", append=True, context_columns=("town",)))
    assert store.raw_ids("town")[store.context("town")].tolist() == ["Bonn", "Ulm", "Rom", "unknown"]


def random_tables(folder: Path, random: np.random.Generator, are_texts: bool) -> tuple[list[Path], dict[str, Any]]:
    """Three files of events in random order of time, and tables; some values are missing, some users and items new."""
    users, items = (np.unique(random.integers(0, 1 << 40, size)) for size in (12, 9))
    prefix = "x" if are_texts else ""
    rows = 90
    events = pd.DataFrame(
        {
            "u": [f"{prefix}{user}" for user in random.choice(users, rows)],
            "i": [f"{prefix}{item}" for item in random.choice(items, rows)],
            "a": random.choice(["buy", "view", "cart"] if are_texts else ["0", "1", "5"], rows),
            "t": random.integers(1_000_000_000, 1_000_000_040, rows),
            "device": random.choice(["web", "phone", "", "car"], rows),
            "seconds": random.choice(["1.5", "", "7", "-2"], rows),
            "shop": random.choice(["north", "south", ""], rows),
        }
    )
    events["shop"] = events.groupby("u")["shop"].transform("max")  # one value, so which event is first has no effect
    events["part"] = np.where(events.t < 1_000_000_025, "train", np.where(events.t < 1_000_000_030, "valid", "test"))
    files = [folder / f"{name}.csv" for name in ("may", "june", "july")]
    for file, part in zip(files, np.array_split(random.permutation(rows), (60, 75)), strict=True):
        events.iloc[part].to_csv(file, index=False)
    known = events.i.unique()[:-1]
    pd.DataFrame(
        {
            "i": [*known, f"{prefix}5"],
            "price": random.integers(1, 50, len(known) + 1),
            "tags": random.choice(["a|b", "", "c"], len(known) + 1),
            "weight": random.choice(["2", "", "3.5"], len(known) + 1),
            "place": random.choice(["1;2", "", "0.5;-1"], len(known) + 1),
            "title": [f"title of {item}" for item in range(len(known) + 1)],
        }
    ).to_csv(folder / "items.csv", index=False)
    (folder / "items.csv").write_text((folder / "items.csv").read_text() + f"{prefix}6,1,a,1,3;4,seven\n")
    pd.DataFrame({"u": events.u.unique()[1:], "age": random.integers(10, 99, events.u.nunique() - 1)}).to_csv(
        folder / "users.csv", index=False
    )
    given: dict[str, Any] = {
        **COLUMNS, "event_columns": ("device", "seconds"), "numbers": ("seconds", "weight"), "vectors": ("place",),
        "item_columns": ("price", "tags", "weight", "place"), "lists": {"tags": "|", "place": ";"},
        "context_columns": ("u", "age", "shop"), "bins": {"price": 3, "age": 2}, "title": "title",
        "items": folder / "items.csv", "context": folder / "users.csv", "titles": folder / "items.csv",
    }  # fmt: skip
    return files, given


@pytest.mark.parametrize("seed", range(4))
def test_a_grown_store_has_the_bytes_of_one_made_at_once(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    files, given = random_tables(tmp_path, random, are_texts=seed % 2 == 1)
    given |= {"all_items": seed % 3 == 1, "split": "part" if seed % 3 else None}
    expected = own_store(tmp_path, files, store="at_once", **given)
    lineage: tuple[str, ...] = ()
    for number, file in enumerate(files):
        before = None if not number else SequenceStore.open(tmp_path / "store")
        store = own_store(tmp_path, file, append=number > 0, **given)
        file.unlink()
        assert store.num_segments == number + 1 and store.lineage[:-1] == lineage
        lineage = store.lineage
        if before and (segments := store.segments()) is not None:
            assert (segments == number).sum() == store.num_events - before.num_events
    assert contents(store.path) == contents(expected.path)
    assert store.lineage[-1] == expected.lineage[-1] and len(lineage) == 3
    store.verify_contents()


@pytest.mark.parametrize("seed", range(2))
def test_forgotten_users_leave_the_store_that_is_made_without_them(
    seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    random = np.random.default_rng(10 + seed)
    files, given = random_tables(tmp_path, random, are_texts=seed % 2 == 1)
    given |= {"bins": {}}
    own_store(tmp_path, files[0], **given)
    store = own_store(tmp_path, files[1], append=True, **given)
    events = pd.concat([pd.read_csv(file, dtype=str, keep_default_na=False) for file in files[:2]])
    left_out = random.choice(events.u.unique(), 3, replace=False).tolist()
    (tmp_path / "users.txt").write_text("\n".join([*left_out, "007", "", "nobody\n"]))
    with caplog.at_level(logging.INFO, logger="hstu"):
        forget("mine", tmp_path / "users.txt", output=store.path)
        forget("mine", tmp_path / "users.txt", output=store.path)  # again, as after a kill
    removed = int(events.u.isin(left_out).sum())
    assert f"5 ids, of which 2 are not in {store.path}" in caplog.text and "which is kept" in caplog.text
    assert f"removed from {store.path}: 3 users with {removed} events" in caplog.text
    events[~events.u.isin(left_out)].to_csv(tmp_path / "others.csv", index=False)
    expected = own_store(tmp_path, tmp_path / "others.csv", store="at_once", **given)
    found = SequenceStore.open(store.path)
    assert arrays(found) == arrays(expected) and found.features == expected.features
    assert found.statistics == {**expected.statistics, "forgotten_users": 3}
    assert (found.num_segments, found.lineage[:-1]) == (2, store.lineage) and found.lineage[-1] == expected.lineage[-1]
    grown = own_store(tmp_path, files[2], append=True, **given)  # it goes on, and files tell of them again
    assert grown.statistics["forgotten_users"] == 3 and len(grown.lineage) == 4
    (tmp_path / "users.txt").write_text("\n".join(map(str, grown.raw_ids("user_id"))))
    with pytest.raises(DataError, match="names all users"):
        forget("mine", tmp_path / "users.txt", output=store.path)
    with pytest.raises(DataError, match="is the store of mine"):
        forget("other", tmp_path / "users.txt", output=store.path)


def test_ids_that_become_text_are_sorted_again(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("numbers.csv", "texts.csv", "more.csv")]
    texts = ("u,i\n9,10\n10,9\n-1,7\n9,9\n", "u,i\nx,10\n9,y\n", "u,i\n100,11\n10,9\n")
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    for number, file in enumerate(files):
        own_store(tmp_path, file, append=number > 0)
    assert contents(tmp_path / "store") == contents(own_store(tmp_path, files, store="at_once").path)


def test_ranges_of_event_columns_stay(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("u,i,price\n1,1,10\n1,1,20\n1,1,30.5\n1,1,40\n")
    (tmp_path / "b.csv").write_text("u,i,price\n1,1,5\n1,1,25\n1,1,99\n1,1,\n")
    given: dict[str, Any] = {"event_columns": ("price",), "bins": {"price": 2}}
    own_store(tmp_path, tmp_path / "a.csv", **given)
    store = own_store(tmp_path, tmp_path / "b.csv", append=True, **given)
    low, high = "10..20", "30.5..40"
    found = store.raw_ids("price")[store.sequence("price")]
    assert found.tolist() == [low, low, high, high, low, low, high, "unknown"] and len(store.ranges["price"]) == 2


def test_there_must_be_a_store(folder: Path) -> None:
    with pytest.raises(DataError, match=r"there is no store at .*store; make it first, without --append"):
        make(folder, "june.csv", append=True)
    with pytest.raises(ConfigError, match="leave out one of them"):
        make(folder, "june.csv", append=True, force=True)


def test_a_kill_leaves_the_earlier_store_and_the_same_command_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(make(folder, "may.csv"))

    def append() -> Path:
        assert contents(folder / "store") == before
        return make(folder, "june.csv", append=True)

    grown, stages = stopped_after_each_stage(monkeypatch, append)
    assert len(stages) > 3
    assert contents(grown) == contents(make(folder, "may.csv", "june.csv", store="at_once"))


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("moment", ["exchange", "put_in_place", "remove"])
def test_a_kill_while_stores_are_exchanged_loses_nothing(
    moment: str, can_exchange: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder, "may.csv")
    plain = {name: getattr(writer, name) for name in ("exchange", "put_in_place", "remove")}

    def killed(*paths: Path) -> bool:
        if any(path in (folder / "store", folder / ".store.discarded") for path in paths) or moment == "remove":
            raise KeyboardInterrupt
        return bool(plain[moment](*paths))

    with monkeypatch.context() as patched:
        if not can_exchange:
            patched.setattr(writer, "exchange", lambda *_: False)
        patched.setattr(writer, moment, killed)
        with suppress(KeyboardInterrupt):
            make(folder, "june.csv", append=True)
    make(folder, "june.csv", append=True)
    assert contents(folder / "store") == contents(make(folder, "may.csv", "june.csv", store="at_once"))


def test_a_bad_row_of_a_new_file_leaves_the_store(folder: Path) -> None:
    before = contents(make(folder, "may.csv"))
    (folder / "june.csv").write_text(f"{JUNE}train,,b,9,view\n")
    with pytest.raises(DataError, match=r"june\.csv:6: 'i' is empty"):
        make(folder, "june.csv", append=True)
    assert contents(folder / "store") == before


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
    (folder / "users.txt").write_text("b\n")
    assert main(["--dataset_name", "mine", "--forget", "users.txt"]) == 0
    assert "users 3, items 2, events 3" in capsys.readouterr().out
    assert main([*command, "--forget", "users.txt"]) == 2
    assert "--forget changes a store, and does not go with --user, --item, --action, --time" in capsys.readouterr().err


def test_what_the_store_does_not_know_is_refused(folder: Path) -> None:
    make(folder, "may.csv", min_user_events=2, split=None)
    with pytest.raises(DataError, match=r"left out events, which may count now .* Make it without them"):
        make(folder, "june.csv", append=True, min_user_events=2, split=None)
    make(folder, "may.csv", force=True)
    (folder / "june.csv").write_text("part,i,u,t,a\ntest,x1,d,9,4\n")
    with pytest.raises(DataError, match=r"actions in 'a' are numbers, and those of .* are texts, such as 'buy'"):
        make(folder, "june.csv", append=True)
    (folder / "june.csv").write_text("part,i,u,t,a\ntrain,x1,d,9,buy\n")
    with pytest.raises(DataError, match=r"--split part: 1 user.*the first of them d, have an event"):
        make(folder, "june.csv", append=True)
    (folder / "may.csv").write_text(JUNE)
    for name in ("may.csv", f"../{folder.name}/may.csv"):
        with pytest.raises(DataError, match=r"may\.csv is in it with another content"):
            make(folder, name, append=True)

"""What users bring: each kind of dirt gets one message that says what, where and what to do, and exit code 3."""

from __future__ import annotations

import gzip
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from hstu.config.errors import DataError
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.store import SequenceStore
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "preprocess_dataset.py"
OWN = ("--dataset_name", "mine", "--interactions", "events.csv", "--user", "u", "--item", "i")
ALL = (*OWN, "--action", "a", "--time", "t")
ML = ("--dataset_name", "ml-100k", "--raw_path", ".")
KUAIRAND = ("--dataset_name", "kuairand-pure", "--raw_path", ".")
GOOD = b"u,i,a,t\n1,7,2,10\n1,8,0,11\n2,7,1,12\n"


def own_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preprocess_dataset", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


main = own_script().main


def named(path: str, **columns: str) -> tuple[str, ...]:
    """The arguments for another file or other columns."""
    changed = {"--interactions": path} | {f"--{name}": column for name, column in columns.items()}
    words = list(ALL)
    for option, value in changed.items():
        words[words.index(option) + 1] = value
    return tuple(words)


def parquet(**columns: list[object]) -> Callable[[Path], None]:
    return lambda file: pd.DataFrame(columns).to_parquet(file)


def zipped(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("events.csv", GOOD)


GZIP = gzip.compress(b"u,i,a,t\n" + b"".join(b"%d,%d,1,%d\n" % (n, n * n, n) for n in range(9_000)))
KUAIRAND_HEADER = (
    b"user_id,video_id,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,is_profile_enter\n"
)
KUAIRAND_USERS = (
    b"user_id,user_active_degree,follow_user_num_range,fans_user_num_range,friend_user_num_range,register_days_range\n"
)
FIRST, SECOND = "log_standard_4_08_to_4_21_pure.csv", "log_standard_4_22_to_5_08_pure.csv"
USERS = "user_features_pure.csv"
KUAIRAND_ROW = b"1,2,1650000000000,1,0,0,0,0,0,1,0\n"


def kuairand(**changed: bytes) -> dict[str, bytes]:
    files = {
        "first": KUAIRAND_HEADER + KUAIRAND_ROW,
        "second": KUAIRAND_HEADER + KUAIRAND_ROW,
        "users": KUAIRAND_USERS + b"1,full_active,a,b,c,d\n",
    } | changed
    return {FIRST: files["first"], SECOND: files["second"], USERS: files["users"]}


Files = dict[str, "bytes | Callable[[Path], None]"]
DIRT: dict[str, tuple[tuple[str, ...], Files, str]] = {
    # what the file is
    "missing file": (ALL, {}, "there is no file events.csv"),
    "a directory": (ALL, {"events.csv": Path.mkdir}, "events.csv is a directory"),
    "empty file": (ALL, {"events.csv": b""}, "events.csv is empty"),
    "header alone": (ALL, {"events.csv": b"u,i,a,t\n"}, "events.csv: no events"),
    "blank first line": (ALL, {"events.csv": b"\n" + GOOD}, "events.csv:1: the first line is empty; it must name"),
    "gzip without .gz": (ALL, {"events.csv": gzip.compress(GOOD)}, "events.csv is gzip-compressed; unpack it, or let"),
    "truncated gzip": (named("e.csv.gz"), {"e.csv.gz": GZIP[:-3_000]}, "cannot read e.csv.gz: .*end"),
    "gzip cut in its header": (named("e.csv.gz"), {"e.csv.gz": GZIP[:6]}, "cannot read e.csv.gz: "),
    "no gzip at all": (named("e.csv.gz"), {"e.csv.gz": GOOD}, "cannot read e.csv.gz: Not a gzipped file"),
    "gzip with a flipped byte": (named("e.csv.gz"), {"e.csv.gz": GZIP[:50] + b"\xaa" + GZIP[51:]}, "cannot read e.csv"),
    "zip": (ALL, {"events.csv": zipped}, "events.csv is a zip archive; unpack it"),
    "Parquet called csv": (ALL, {"events.csv": parquet(u=[1], i=[2])}, "is a Parquet file; let its name end in"),
    "csv called Parquet": (named("e.parquet"), {"e.parquet": GOOD}, "e.parquet is not a Parquet file"),
    "Parquet cut short": (
        named("e.parquet"),
        {"e.parquet": lambda file: (parquet(u=[1], i=[2])(file), os.truncate(file, 200))},
        "e.parquet is a damaged Parquet file",
    ),
    "an Excel sheet": (ALL, {"events.csv": b"\xd0\xcf\x11\xe0" + bytes(99)}, "an Excel workbook; save the sheet"),
    "a web page": (ALL, {"events.csv": b"<!DOCTYPE html><html>404</html>"}, "is a web page, perhaps an error"),
    "UTF-16": (ALL, {"events.csv": GOOD.decode().encode("utf-16")}, "is UTF-16 text; convert it to UTF-8"),
    "a zero byte": (ALL, {"events.csv": GOOD + b"3,\x00,1,1\n"}, "events.csv:5: a zero byte"),
    "a Git LFS pointer": (ALL, {"events.csv": b"version https://git-lfs.github.com/spec/v1\n"}, "Git LFS pointer"),
    "another ending": (named("e.xlsx"), {"e.xlsx": GOOD}, "the name of a table ends in .csv, .tsv"),
    # columns
    "missing column": (
        named("events.csv", item="sku"),
        {"events.csv": GOOD},
        "has no column 'sku'. It has: u, i, a",
    ),
    "renamed column": (ALL, {"events.csv": GOOD.replace(b"u,i", b"user,i")}, "has no column 'u'. It has: user, i"),
    "misspelt column": (
        named("events.csv", item="movie_ids"),
        {"events.csv": GOOD.replace(b"u,i", b"u,movie_id")},
        "no column 'movie_ids'. Did you mean 'movie_id'",
    ),
    "column twice": (ALL, {"events.csv": GOOD.replace(b"u,i", b"u,u")}, "events.csv:1: .* every column once"),
    "column without name": (ALL, {"events.csv": GOOD.replace(b"u,i", b"u,")}, "events.csv:1: .* every column once"),
    "wrong delimiter": (ALL, {"events.csv": GOOD.replace(b",", b";")}, "separated by ',', these seem to be by ';'"),
    "tabs in a csv": (ALL, {"events.csv": GOOD.replace(b",", b"\t")}, r"these seem to be by '\\t'"),
    "commas in a tsv": (named("e.tsv"), {"e.tsv": GOOD}, r"separated by '\\t', these seem to be by ','"),
    "no header": (ALL, {"events.csv": GOOD.partition(b"\n")[2]}, "has no columns 'u', 'i', 'a', 't'. It has: 1, 7"),
    # lines
    "too few columns": (ALL, {"events.csv": GOOD + b"3,4\n"}, "events.csv:5: expected columns: 4 found: 2"),
    "too many columns": (ALL, {"events.csv": GOOD + b"3,4,1,1,9\n"}, "events.csv:5: expected columns: 4 found: 5"),
    "the last line cut off": (ALL, {"events.csv": GOOD + b"3,9"}, "events.csv:5: expected columns: 4 found: 2"),
    "Latin-1": (ALL, {"events.csv": GOOD + "ä,1,1,1\n".encode("latin-1")}, "events.csv:5: bytes that are not UTF-8"),
    "an open quote": (ALL, {"events.csv": b'u,i,a,t\n1,"7,2,10\n1,8,0,11\n'}, "events.csv:2: a quote is opened"),
    "CR LF and LF": (ALL, {"events.csv": GOOD + b"3,7,1,1\r\n"}, "some lines end in CR LF and some in LF"),
    "an endless line": (
        ALL,
        {"events.csv": GOOD + b"x" * 2_100_000 + b",1,1,1\n"},
        "events.csv:5: a line of more",
    ),
    "after a quoted line break": (ALL, {"events.csv": GOOD + b'"x\ny",1,1,1\n5,6\n'}, "events.csv:7: expected columns"),
    "after blank lines": (ALL, {"events.csv": GOOD + b"\n\n5,6\n"}, "events.csv:7: expected columns"),
    # values
    "action of text": (ALL, {"events.csv": GOOD + b"3,7,yes,1\n"}, "events.csv:5: 'a' is 'yes'; allowed is an integer"),
    "half stars": (ALL, {"events.csv": GOOD + b"3,7,3.5,1\n"}, "events.csv:5: 'a' is '3.5'.*double them"),
    "action NaN": (ALL, {"events.csv": GOOD + b"3,7,nan,1\n"}, "events.csv:5: 'a' is 'nan'; allowed is an integer"),
    "negative action": (ALL, {"events.csv": GOOD + b"3,7,-1,1\n"}, "events.csv:5: 'a' is '-1'; allowed is an integer"),
    "huge action": (ALL, {"events.csv": GOOD + b"3,7,9999999999,1\n"}, "events.csv:5: 'a' is '9999999999'"),
    "no user": (ALL, {"events.csv": GOOD + b",7,1,1\n"}, "events.csv:5: 'u' is empty"),
    "no item": (ALL, {"events.csv": GOOD + b"3,,1,1\n"}, "events.csv:5: 'i' is empty"),
    "no time": (ALL, {"events.csv": GOOD + b"3,7,1,\n"}, "events.csv:5: 't' is empty"),
    "time of text": (ALL, {"events.csv": GOOD + b"3,7,1,noon\n"}, "events.csv:5: 't' is 'noon'; allowed is seconds"),
    "negative time": (ALL, {"events.csv": GOOD + b"3,7,1,-5\n"}, "events.csv:5: 't' is '-5'; allowed is seconds since"),
    "time infinite": (ALL, {"events.csv": GOOD + b"3,7,1,inf\n"}, "events.csv:5: 't' is 'inf'"),
    "milliseconds": (ALL, {"events.csv": GOOD + b"3,7,1,1650000000000\n"}, "events.csv:5: 't' is '1650000000000'"),
    "a date that is none": (
        ALL,
        {"events.csv": b"u,i,a,t\n1,2,1,2024-01-01\n1,2,1,2024-02-30\n"},
        "csv:3: 't' is '2024",
    ),
    "several bad rows": (
        ALL,
        {"events.csv": GOOD + b"3,,1,1\n3,,1,1\n"},
        r"csv:5: 'i' is empty.*\(2 such rows\)",
    ),
    "ids of Parquet with fractions": (
        named("e.parquet"),
        {"e.parquet": parquet(u=[1.5], i=[1], a=[1], t=[1])},
        "ids in 'u' must be integers or strings, the column is DOUBLE",
    ),
    "NULL in Parquet": (
        named("e.parquet"),
        {"e.parquet": parquet(u=["x", "y"], i=["p", None], a=[1, 1], t=[1, 1])},
        "e.parquet, row 2: 'i' is empty",
    ),
    # built-in formats
    "ml: commas for tabs": (ML, {"u.data": b"1,2,3,4\n", "u.user": b"1|2|M|x|1\n"}, "u.data:1: expected 4 columns"),
    "ml: an id beyond int64": (
        ML,
        {"u.data": b"1\t2\t3\t4\n1\t99999999999999999999\t3\t4\n", "u.user": b"1|2|M|x|1\n"},
        "u.data:2: column 'item' holds '99999999999999999999', which is not an integer of 64 bits",
    ),
    "ml: a rating of 6": (
        ML,
        {"u.data": b"1\t2\t6\t4\n", "u.user": b"1|2|M|x|1\n"},
        "u.data:1: 'rating' is 6; allow",
    ),
    "ml: a user twice": (
        ML,
        {"u.data": b"1\t2\t3\t4\n", "u.user": b"1|24|M|x|1\n1|25|M|x|1\n"},
        "u.user:2: another row for user 1",
    ),
    "ml: only one of two files": (
        ML,
        {"u.data": b"1\t2\t3\t4\n"},
        "does not hold the files of ml-100k",
    ),
    "kuairand: a signal missing": (
        KUAIRAND,
        kuairand(second=KUAIRAND_HEADER.replace(b",is_hate", b"") + b"1,2,1650000000000,1,0,0,0,0,1,0\n"),
        f"{SECOND} has no column 'is_hate'",
    ),
    "kuairand: a user that is no number": (
        KUAIRAND,
        kuairand(first=KUAIRAND_HEADER + KUAIRAND_ROW + b"x" + KUAIRAND_ROW),
        f"{FIRST}:3: column 'user_id' holds 'x1', which is not an integer",
    ),
    "kuairand: negative time": (
        KUAIRAND,
        kuairand(second=KUAIRAND_HEADER + KUAIRAND_ROW.replace(b",16", b",-16")),
        f"{SECOND}:2: 'time_ms' is -1650000000000; allowed is milliseconds since 1970",
    ),
    "kuairand: nothing in a signal": (
        KUAIRAND,
        kuairand(first=KUAIRAND_HEADER + KUAIRAND_ROW.replace(b",1,0\n", b",,0\n")),
        f"{FIRST}:2: 'is_click, .*' is empty",
    ),
}


@pytest.mark.parametrize("dirt", DIRT)
def test_dirt_is_named_with_its_place_and_nothing_is_left(
    dirt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, files, message = DIRT[dirt]
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        else:
            content(Path(name))
    code = main([*arguments, "--output", "store"])
    told = capsys.readouterr().err
    assert re.search(message.replace(".csv", r"\.csv"), told), told
    assert code == (2 if dirt == "another ending" else 3)
    assert len([line for line in told.splitlines() if line]) == 1, "one clear message"
    assert sorted(os.listdir()) == sorted(files), "nothing half-written"


CLEANABLE = GOOD + b",7,1,1\n3,,1,2\n3,7,1\n3,7,one,4\n3,7,1,5\n"


def test_bad_rows_may_be_skipped_and_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("events.csv").write_bytes(CLEANABLE)
    assert main([*ALL, "--output", "dirty", "--bad_row_policy", "skip"]) == 0
    Path("events.csv").write_bytes(GOOD + b"3,7,1,5\n")
    assert main([*ALL, "--output", "clean"]) == 0
    dirty, clean = SequenceStore.open("dirty"), SequenceStore.open("clean")
    for name in ("i", "a", "t"):
        assert dirty.sequence(name).tolist() == clean.sequence(name).tolist()
    assert dirty.raw_ids("user_id").tolist() == [1, 2, 3]
    assert dirty.statistics["skipped_rows"] == {
        **{"too few columns": 1, "unusable user": 1, "unusable item": 1, "unusable action": 1}
    }
    assert "skipped: events.csv:7: expected columns: 4 found: 3" in caplog.text


def test_skipping_has_a_cap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("events.csv").write_bytes(CLEANABLE)
    assert main([*ALL, "--output", "s", "--bad_row_policy", "skip", "--max_bad_rows", "3"]) == 3
    assert "That makes 4 bad rows, more than --max_bad_rows 3" in capsys.readouterr().err
    assert os.listdir() == ["events.csv"]


ACCEPTED = {
    "BOM": b"\xef\xbb\xbf" + GOOD,
    "CR LF": GOOD.replace(b"\n", b"\r\n"),
    "no line break at the end": GOOD[:-1],
    "unsorted": b"u,i,a,t\n2,7,1,12\n1,8,0,11\n1,7,2,10\n",
    "blank lines": GOOD.replace(b"\n", b"\n\n"),
    "quotes": GOOD.replace(b"7", b'"7"'),
    "other columns besides": b"x,u,i,a,t\nq,1,7,2,10\nq,1,8,0,11\nq,2,7,1,12\n",
}


@pytest.mark.parametrize("form", ACCEPTED)
def test_harmless_differences_of_form_change_nothing(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("events.csv", ACCEPTED[form]), ("plain.csv", GOOD)):
        Path(name).write_bytes(content)
        assert main([*named(name), "--output", name.removesuffix(".csv")]) == 0
    for file in Path("plain").glob("*.npy"):
        assert (Path("events") / file.name).read_bytes() == file.read_bytes(), file.name


def test_gzipped_text_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("events.csv.gz").write_bytes(gzip.compress(GOOD))
    assert main([*named("events.csv.gz"), "--output", "store"]) == 0
    assert SequenceStore.open("store").sequence("t").tolist() == [10, 11, 12]


def test_ids_beyond_int64_are_taken_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("events.csv").write_bytes(GOOD + b"18446744073709551616,7,1,13\n")
    assert main([*ALL, "--output", "store"]) == 0
    assert SequenceStore.open("store").raw_ids("user_id").tolist() == ["1", "18446744073709551616", "2"]


def test_one_event_users_and_a_user_of_a_million_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    events = np.arange(1_000_000)
    table = {"u": np.where(events % 1000, 5, events), "i": events % 97, "a": events % 3, "t": events[::-1]}
    pd.DataFrame(table).to_parquet("e.parquet")
    assert main([*named("e.parquet"), "--output", "store"]) == 0
    store = SequenceStore.open("store")
    lengths = np.diff(store.offsets())
    assert sorted(lengths.tolist()) == [1] * 1000 + [999_000]
    begin = store.offsets()[lengths.argmax()]
    assert (np.diff(store.sequence("t")[begin : begin + 999_000]) > 0).all()


def run_script(*arguments: str, cwd: Path, file_limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit)


def many_events(file: Path) -> None:
    events = np.random.default_rng(0).permutation(300_000)
    pd.DataFrame({"u": events % 1000, "i": events * 7919, "a": 1, "t": events}).to_csv(file, index=False)


@pytest.mark.parametrize("limit", [100_000, 1_000_000, 2_000_000])
def test_a_write_that_fails_is_told_and_undone(limit: int, tmp_path: Path) -> None:
    """A limit on the size of a file stands in for the full disk; the kernel refuses the write in the same way."""
    many_events(tmp_path / "events.csv")
    failed = run_script(*ALL, "--output", "store", cwd=tmp_path, file_limit=limit)
    assert failed.returncode == 3, failed.stderr
    assert "choose another --output" in failed.stderr and "Traceback" not in failed.stderr
    assert os.listdir(tmp_path) == ["events.csv"]


@pytest.mark.parametrize(("size", "options"), [("3m", ""), ("8m", ""), ("8m", ",ro")])
def test_a_full_and_a_read_only_disk(size: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, raw = tmp_path / "disk", tmp_path / "raw"
    disk.mkdir()
    raw.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("NEEDS THE RIGHT TO MOUNT: a small disk of its own")
    try:
        many_events(raw / "events.csv")
        monkeypatch.setattr("hstu.data.preprocess.disk._WORKING_BYTES", -15)  # so that it is the write that fails
        monkeypatch.chdir(raw)
        with pytest.raises(DataError, match=r"free some space|Read-only file system"):
            import_interactions("mine", InteractionColumns(interactions=Path("events.csv"), user="u", item="i",
                                action="a", time="t"), output=disk / "store")  # fmt: skip
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_too_small_a_disk_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many_events(tmp_path / "events.csv")
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**7, 0, 10**7))
    columns = InteractionColumns(interactions=tmp_path / "events.csv", user="u", item="i")
    with pytest.raises(DataError, match=r"has 0\.0 GiB free, and preprocessing needs about 0\.0 GiB there"):
        import_interactions("mine", columns, output=tmp_path / "store")
    assert os.listdir(tmp_path) == ["events.csv"]


def test_of_two_processes_at_once_one_makes_the_store(tmp_path: Path) -> None:
    many_events(tmp_path / "events.csv")
    command = [sys.executable, str(SCRIPT), *ALL, "--output", "store"]
    both = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = {process.wait(timeout=120): process.stderr.read() for process in both if process.stderr}
    assert 0 in told
    assert set(told) == {0} or "another process is writing" in told[3], told
    assert SequenceStore.open(tmp_path / "store").num_events == 300_000
    assert sorted(os.listdir(tmp_path)) == ["events.csv", "store", "store.report"]

"""Users' own tables in all their forms: several files, no header, other delimiters, units and line ends."""

import gzip
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from hstu.base.errors import ConfigError, DataError
from hstu.data.store.sequence_store import SequenceStore
from scripts.preprocess_dataset import main
from tests.data.own_tables import histories, own_store
from tests.data.preprocess.test_restart import arrays

RATINGS = "7::A::3::10\n7::B::4::11\n8::A::5::9\n"


make = partial(own_store, store="mine")


def write(file: Path, text: str) -> Path:
    file.write_bytes(text.encode())
    return file


# --- several files -------------------------------------------------------------------------------------------------


def test_rows_of_several_files_follow_one_another(tmp_path: Path) -> None:
    second = tmp_path / "b.parquet"
    pd.DataFrame({"u": [1, 2], "i": [30, 40]}).to_parquet(second)
    third = tmp_path / "c.csv.gz"
    third.write_bytes(gzip.compress(b"i,u\n50,1\n"))
    store = make(tmp_path, [write(tmp_path / "z.csv", "u,i\n1,10\n1,20\n"), second, third])
    assert histories(store) == {1: [10, 20, 30, 50], 2: [40]}
    assert sorted(store.sources) == ["b.parquet", "c.csv.gz", "z.csv"]


def test_a_directory_stands_for_its_files_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    days = Path("days")
    (days / "older").mkdir(parents=True)
    write(days / "day_10.csv", "u,i\n1,30\n")
    (days / "day_9.csv.zst").write_bytes(pa.compress(b"u,i\n1,10\n1,20\n", codec="zstd", asbytes=True))
    for name in ("README.md", ".day_1.csv", "older/day_1.csv"):
        write(days / name, "no table")
    assert histories(make(tmp_path, days)) == {1: [10, 20, 30]}
    write(days / "day_11.csv", "u,i\n1,40\n")
    command = ["--dataset_name", "mine", "--interactions", "days", "--user", "u", "--item", "i", "--output", "mine"]
    assert main([*command, "--append"]) == 0
    store = SequenceStore.open("mine")
    assert histories(store) == {1: [10, 20, 30, 40]} and "days/day_9.csv.zst" in str(store.command)
    command[3] = "days/older"
    Path("days/older/day_1.csv").unlink()
    assert main([*command, "--force"]) == 3
    assert (
        "days/older is a directory without files that end in .csv, .tsv, .csv.gz, .csv.zst," in capsys.readouterr().err
    )


def test_the_type_of_an_id_is_that_of_all_files_together(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.csv", "u,i,t\n1,10,5\n"), write(tmp_path / "b.csv", "u,i,t\n1,x,2024-01-01\n1,11,6\n")]
    with pytest.raises(DataError, match=r"b\.csv:2: 't' is '2024-01-01'"):
        make(tmp_path, files, time="t")
    assert histories(make(tmp_path, files)) == {1: ["10", "x", "11"]}


def test_files_of_one_name_in_two_folders_have_a_checksum_each(tmp_path: Path) -> None:
    for name in ("day1", "day2"):
        (tmp_path / name).mkdir()
    first = write(tmp_path / "day1" / "e.csv", "u,i\n1,10\n")
    store = make(tmp_path, [first, write(tmp_path / "day2" / "e.csv", "u,i\n1,20\n")])
    assert len(store.sources) == 2 and len(set(store.sources.values())) == 2


# --- text files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ratings.dat", "ratings.txt", "u.data", "ratings.csv"])
def test_files_without_header_and_with_any_delimiter_are_read(tmp_path: Path, name: str) -> None:
    columns: dict[str, Any] = {"header": ("u", "i", "a", "t"), "action": "a", "time": "t"}
    store = make(tmp_path, write(tmp_path / name, RATINGS), delimiter="::", **columns)
    assert histories(store) == {7: ["A", "B"], 8: ["A"]}
    assert store.sequence("a").tolist() == [3, 4, 5]


def test_the_command_takes_the_delimiter_of_all_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "u.data", RATINGS.replace("::", "\t"))
    write(tmp_path / "u.user", "u\tage\tsex\n7\t24\tM\n8\t53\tF\n")
    command = ["--dataset_name", "tabs", "--interactions", "u.data", "--delimiter", "tab", "--header", "u,i,a,t"]
    command += ["--user", "u", "--item", "i", "--context", "u.user", "--context_columns", "sex"]
    assert main(command) == 0
    store = SequenceStore.open("tmp_data/tabs")
    assert store.raw_ids("sex")[store.context("sex")].tolist() == ["M", "F"]


@pytest.mark.parametrize("delimiter", ["::", ";", "\t", "|", ","])
def test_the_first_line_says_what_separates_columns(tmp_path: Path, delimiter: str) -> None:
    text = "u,i,a\n7,A:b,3\n7,B,4\n".replace(",", delimiter)
    assert histories(make(tmp_path, write(tmp_path / "r.dat", text), action="a")) == {7: ["A:b", "B"]}


def test_the_headers_of_recbole_say_what_options_would(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "r.inter", "item:token\tuser_id:token\ttimestamp:float\tlabel:float\ttext:token_seq\n"
          'A:b\t7\t9e8\t3\tx y\nB\t7\t950000000\t4.0\t"\nB\t8\t950000001\t4\t\n')  # fmt: skip
    write(tmp_path / "r.user", "user_id:token\tage:float\tlikes:token_seq\n7\t20.5\ta\n8\t30\tb\n")
    header = "item:token\tfull_title:token_seq\tage:float\tprice:float\ttags:token_seq\temb:float_seq\n"
    write(tmp_path / "r.item", header + 'A:b\t"A" b\t1\t\tx  y\t0 1\nB\tB\t1\t2.5\t\t2 3\n')
    caplog.set_level("INFO")
    command = ["--dataset_name", "mine", "--interactions", str(tmp_path / "r.inter"), "--item", "item"]
    assert main([*command, "--output", str(tmp_path / "derived")]) == 0
    assert f"{tmp_path / 'r.inter'}: not read are text, likes, age" in caplog.messages
    store = SequenceStore.open(tmp_path / "derived")
    options: dict[str, Any] = {
        "user": "user_id", "item": "item", "action": "label", "time": "timestamp", "bins": {"age": 10},
        "context": tmp_path / "r.user", "context_columns": ("user_id", "age"), "items": tmp_path / "r.item",
        "item_columns": ("price", "tags", "emb"), "numbers": ("price",), "vectors": ("emb",),
        "lists": {"tags": " ", "emb": " "}, "titles": tmp_path / "r.item", "title": "full_title",
    }  # fmt: skip
    assert arrays(store) == arrays(make(tmp_path, tmp_path / "r.inter", **options))
    assert histories(store) == {7: ["A:b", "B"], 8: ["B"]} and store.sequence("label").tolist() == [3, 4, 4]
    titles = store.titles()
    assert titles is not None and titles.tolist() == ['"A" b', "B"]


def test_headers_that_do_not_say_enough_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for header, message in (
        ("user_id:token\tartist:token", "the item in 'item_id', and the columns are user_id, artist;"),
        ("user_id:token\titem_id_list:token_seq\titem_id:token", "a row must be one event"),
        ("user_id:token item_id:token", "must give the types of the columns, divided by tabs"),
    ):
        file = write(tmp_path / "a.inter", f"{header}\n1\t2\t3\n")
        assert main(["--dataset_name", "mine", "--interactions", str(file), "--output", str(tmp_path / "store")]) == 3
        assert message in capsys.readouterr().err


def test_a_row_of_a_file_without_header_is_reported_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"r\.dat:3: 'a' is '3\.5'"):
        file = write(tmp_path / "r.dat", "1;5;1\n1;6;2\n1;7;3.5\n")
        make(tmp_path, file, delimiter=";", header=("u", "i", "a"), action="a")


def test_a_parquet_file_has_its_own_names(tmp_path: Path) -> None:
    pd.DataFrame({"u": [1], "i": [2]}).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(ConfigError, match="leave out --header"):
        make(tmp_path, tmp_path / "e.parquet", header=("u", "i"))


@pytest.mark.parametrize("text", ["u,i\n1,a\r\n1,b\n1,c\r\n", "u,i\r\n1,a\r\n\n1,b\r\r\n1,c"])
def test_lines_may_end_in_different_ways(tmp_path: Path, text: str) -> None:
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert histories(make(tmp_path, tmp_path / "e.csv.gz")) == {1: ["a", "b", "c"]}


def test_a_bad_line_among_mixed_line_ends_is_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"e\.csv:4: expected columns: 2 found: 3 or more; each row is one event"):
        make(tmp_path, write(tmp_path / "e.csv", "u,i\r\n1,a\n\r\n1,b,x\r\n1,c\n"))
    assert not (tmp_path / "mine").exists()


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("unit", "times"),
    [
        ("ms", [1_650_000_000_999, 1_650_000_000_001]),
        ("us", [1_650_000_000_999_999, 1_650_000_000_000_001]),
        ("ns", [1_650_000_000_999_999_999, 1_650_000_000_000_000_001]),
        ("ms", [1_650_000_000_999.5, 1_650_000_000_999.25]),
        ("ms", ["2022-04-15 05:20:00.7", "2022-04-15 05:20:00.5"]),
    ],
)
def test_times_in_other_units_become_seconds_and_keep_their_order(
    tmp_path: Path, unit: str, times: list[Any], suffix: str
) -> None:
    table, file = pd.DataFrame({"u": [1, 1], "i": ["late", "early"], "t": times}), tmp_path / f"e{suffix}"
    table.to_csv(file, index=False) if suffix == ".csv" else table.to_parquet(file)
    store = make(tmp_path, file, time="t", time_unit=unit)
    assert histories(store) == {1: ["early", "late"]}
    assert store.sequence("t").tolist() == [1_650_000_000] * 2


@pytest.mark.parametrize(("number", "unit"), [(10**12, "ms"), (10**15, "us"), (10**18, "ns")])
def test_too_large_a_time_is_answered_with_the_option_of_its_unit(tmp_path: Path, number: int, unit: str) -> None:
    file = write(tmp_path / "e.csv", f"u,i,t\n1,a,{number}\n")
    with pytest.raises(DataError, match=rf"'t' is '{number}'; allowed is seconds since 1970 \(--time_unit\)"):
        make(tmp_path, file, time="t")
    assert make(tmp_path, file, time="t", time_unit=unit).sequence("t").tolist() == [10**9]


UNLIKELY: dict[str, tuple[list[Any], str, str]] = {
    "Excel": ([45_000.5, 45_443] * 500, "s", "12:30:00 to 1970-01-01 12:37:23 UTC, before 1990"),
    "YYYYMMDDhhmmss": ([20_240_531_120_000] * 1000, "ms", "after 2100"),
    "a counter": ([*range(1000)], "s", "before 1990. Is it the right column"),
    "one day": (["2024-05-31 12:00", "2024-05-31 23:00"] * 500, "s", "within one day. Is it the right column"),
}


@pytest.mark.parametrize("times", UNLIKELY)
def test_times_that_are_something_else_need_a_word(tmp_path: Path, times: str) -> None:
    values, unit, message = UNLIKELY[times]
    rows = "".join(f"1,a,{value}\n" for value in values)
    file = write(tmp_path / "e.csv", f"u,i,t\n{rows}")
    with pytest.raises(DataError, match=f"{message}.*add --any_times"):
        make(tmp_path, file, time="t", time_unit=unit)
    assert make(tmp_path, file, time="t", time_unit=unit, any_times=True).num_events == len(values)
    make(tmp_path, file, time="t", time_unit=unit)  # the existing store is kept


@pytest.mark.parametrize("values", [[10, 11], ["1985-05-31", "1985-06-01"], [1_717_000_000] * 9, [0, 1_717_000_000]])
def test_the_period_is_told_and_toys_need_no_word(
    tmp_path: Path, values: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    rows = "".join(f"1,a,{value}\n" for value in values)
    with caplog.at_level("INFO"):
        make(tmp_path, write(tmp_path / "e.csv", f"u,i,t\n{rows}"), time="t")
    assert re.search(r"the \d events are of \d{4}-\d\d-\d\d [\d:]{8} to \d{4}-\d\d-\d\d [\d:]{8} UTC", caplog.text)


NUMBERS = {
    **dict.fromkeys(("5_0", "1_0.5", "0x10", "٥"), "atn"), **dict.fromkeys(("5.4", "1e2"), "a"),
    **dict.fromkeys((" 50 ", "+50", "50.0"), ""),
}  # fmt: skip
"""Text → columns (action, time, number) in which it makes a bad row."""


@pytest.mark.parametrize("text", NUMBERS)
def test_what_is_no_plain_number_is_a_bad_row_and_never_another_value(tmp_path: Path, text: str) -> None:
    good = "1,x,50,50,50\n" * 2
    rows = f"1,x,{text},50,50\n1,x,50,{text},50\n1,x,50,50,{text}\n"
    file = write(tmp_path / "e.csv", f"u,i,a,t,n\n{good}{rows}")
    columns: dict[str, Any] = {"action": "a", "time": "t", "event_columns": ("n",)}
    store = make(tmp_path, file, numbers=("n",), bad_row_policy="skip", **columns)
    names = {"a": "action", "t": "time", "n": "n"}
    assert store.statistics["skipped_rows"] == {f"unusable {names[column]}": 1 for column in NUMBERS[text]}
    assert set(store.sequence("a").tolist()) == {50}
    if len(NUMBERS[text]) != 1:
        assert set(store.sequence("t").tolist()) == set(store.sequence("n").tolist()) == {50}
    if "_" in text:
        with pytest.raises(DataError, match=f"--bins n=2: not all values are finite numbers, such as '{text}'"):
            make(tmp_path, file, bins={"n": 2}, force=True, bad_row_policy="skip", **columns)


@pytest.mark.parametrize("values", [["1.0", "2.0"], ["1.5", "7"], ["1e3", "2.5"]])
def test_decimal_numbers_are_no_ids_in_csv_as_in_parquet(tmp_path: Path, values: list[str]) -> None:
    rows = "".join(f"{value},x\n" for value in values)
    with pytest.raises(DataError, match=r"e\.csv: ids in 'u' are decimal numbers, such as .*astype\('Int64'\)"):
        make(tmp_path, write(tmp_path / "e.csv", f"u,i\n{rows}"))
    pd.DataFrame({"u": np.array(values, dtype=float), "i": ["x"] * 2}).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(DataError, match="ids in 'u' must be integers or strings"):
        make(tmp_path, tmp_path / "e.parquet")


def test_texts_with_points_are_ids(tmp_path: Path) -> None:
    store = make(tmp_path, write(tmp_path / "e.csv", "u,i\n1.0,a.b@c.org\nv1.2,007\n"))
    assert histories(store) == {"1.0": ["a.b@c.org"], "v1.2": ["007"]}

"""Dirty inputs: the arguments of scripts/preprocess_dataset.py, the files, and what must be said about them."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa

OWN = ("--dataset_name", "mine", "--interactions", "events.csv", "--user", "u", "--item", "i")
ALL = (*OWN, "--action", "a", "--time", "t")
ML = ("--dataset_name", "ml-100k", "--raw_path", ".")
SEQUENCES = ("--dataset_name", "mine", "--interactions", "s.txt", "--sequences")
JSON = (*SEQUENCES, "--items", "a.json", "--item_columns", "tags")
TOYS = ("--dataset_name", "amazon-toys", "--raw_path", ".")
KUAIRAND = ("--dataset_name", "kuairand-pure", "--raw_path", ".")
GOOD = b"u,i,a,t\n1,7,2,10\n1,8,0,11\n2,7,1,12\n"


Files = dict[str, "bytes | Callable[[Path], None]"]


def named(path: str, **columns: str) -> tuple[str, ...]:
    """The arguments for another file or other columns."""
    changed = {"--interactions": path} | {f"--{name}": column for name, column in columns.items()}
    words = list(ALL)
    for option, value in changed.items():
        words[words.index(option) + 1] = value
    return tuple(words)


def parquet(**columns: list[object]) -> Callable[[Path], None]:
    return lambda file: pd.DataFrame(columns).to_parquet(file)


def parquet_cut_short(file: Path) -> None:
    parquet(u=[1], i=[2])(file)
    os.truncate(file, 200)


def zstd(text: bytes) -> bytes:
    return bytes(pa.compress(text, codec="zstd", asbytes=True))


LONG = b"u,i,a,t\n" + b"".join(b"%d,%d,1,%d\n" % (n, n * n, n) for n in range(9_000))
GZIP = gzip.compress(LONG)
KUAIRAND_HEADER = (
    b"user_id,video_id,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,is_profile_enter\n"
)
KUAIRAND_USERS = (
    b"user_id,user_active_degree,follow_user_num_range,fans_user_num_range,friend_user_num_range,register_days_range\n"
)
KUAIRAND_VIDEOS = b"video_id,tag,video_type,upload_type,music_type,author_id,music_id,video_duration\n"
FIRST, SECOND = "log_standard_4_08_to_4_21_pure.csv", "log_standard_4_22_to_5_08_pure.csv"
USERS, VIDEOS = "user_features_pure.csv", "video_features_basic_pure.csv"
KUAIRAND_ROW = b"1,2,1650000000000,1,0,0,0,0,0,1,0\n"


def kuairand(**changed: bytes) -> Files:
    files = {
        "first": KUAIRAND_HEADER + KUAIRAND_ROW,
        "second": KUAIRAND_HEADER + KUAIRAND_ROW,
        "users": KUAIRAND_USERS + b"1,full_active,a,b,c,d\n",
    } | changed
    return {FIRST: files["first"], SECOND: files["second"], USERS: files["users"]}


DIRT: dict[str, tuple[tuple[str, ...], Files, str]] = {
    # what the file is
    "missing file": (ALL, {}, "there is no file events.csv"),
    "a directory": (ALL, {"events.csv": Path.mkdir}, "events.csv is a directory"),
    "empty file": (ALL, {"events.csv": b""}, "events.csv is empty"),
    "header alone": (ALL, {"events.csv": b"u,i,a,t\n"}, "events.csv: no events"),
    "blank first line": (ALL, {"events.csv": b"\n" + GOOD}, "events.csv:1: the first line is empty; it must name"),
    "gzip without .gz": (
        ALL,
        {"events.csv": gzip.compress(GOOD)},
        "events.csv:1: a zero byte, .* let the name end in .gz",
    ),
    "truncated gzip": (named("e.csv.gz"), {"e.csv.gz": GZIP[:-3_000]}, "cannot read e.csv.gz: "),
    "Parquet called csv": (ALL, {"events.csv": parquet(u=[1], i=[2])}, "events.csv:1: a zero byte, .* or .parquet"),
    "csv called Parquet": (named("e.parquet"), {"e.parquet": GOOD}, "e.parquet is not a Parquet file"),
    "Parquet cut short": (named("e.parquet"), {"e.parquet": parquet_cut_short}, "e.parquet is a damaged Parquet file"),
    "UTF-16": (ALL, {"events.csv": GOOD.decode().encode("utf-16")}, "events.csv:1: a zero byte, .*convert UTF-16"),
    "a zero byte": (ALL, {"events.csv": GOOD + b"3,\x00,1,1\n"}, "events.csv:5: a zero byte"),
    # columns
    "missing column": (named("events.csv", item="sku"), {"events.csv": GOOD}, "has no column 'sku'. It has: u, i, a"),
    "another delimiter": (
        (*ALL, "--delimiter", ";"),
        {"events.csv": GOOD},
        "no columns 'u', 'i', 'a', 't'. .* with --delimiter. It has: u,i,a,t",
    ),
    "misspelt column": (
        named("events.csv", item="movie_ids"),
        {"events.csv": GOOD.replace(b"u,i", b"u,movie_id")},
        "no column 'movie_ids'. Did you mean 'movie_id'",
    ),
    "column twice": (ALL, {"events.csv": GOOD.replace(b"u,i", b"u,u")}, "events.csv:1: .* every column once"),
    "no header": (ALL, {"events.csv": GOOD.partition(b"\n")[2]}, "has no columns 'u', 'i', 'a', 't'. It has: 1, 7"),
    # lines
    "too few columns": (ALL, {"events.csv": GOOD + b"3,4\n"}, "events.csv:5: expected columns: 4 found: 2"),
    "too many columns": (ALL, {"events.csv": GOOD + b"3,4,1,1,9\n"}, "events.csv:5: expected columns: 4 found: 5"),
    "Latin-1": (ALL, {"events.csv": GOOD + "ä,1,1,1\n".encode("latin-1")}, "events.csv:5: bytes that are not UTF-8"),
    "an open quote": (ALL, {"events.csv": b'u,i,a,t\n1,"7,2,10\n1,8,0,11\n'}, "events.csv:2: a quote is opened"),
    "an endless line": (ALL, {"events.csv": GOOD + b"x" * 2_100_000 + b",1,1,1\n"}, "events.csv:5: a line of more"),
    "after a quoted line break": (ALL, {"events.csv": GOOD + b'"x\ny",1,1,1\n5,6\n'}, "events.csv:7: expected columns"),
    # values
    "action of text": (ALL, {"events.csv": GOOD + b"3,7,yes,1\n"}, "events.csv:5: 'a' is 'yes'; allowed is an integer"),
    "a bad line of zstd": (named("e.csv.zst"), {"e.csv.zst": zstd(GOOD + b"2,8,no,1\n")}, "e.csv.zst:5: 'a' is 'no'"),
    "half stars": (ALL, {"events.csv": GOOD + b"3,7,3.5,1\n"}, "events.csv:5: 'a' is '3.5'.*double them"),
    "negative action": (ALL, {"events.csv": GOOD + b"3,7,-1,1\n"}, "events.csv:5: 'a' is '-1'; allowed is an integer"),
    "no user": (ALL, {"events.csv": GOOD + b",7,1,1\n"}, "events.csv:5: 'u' is empty"),
    "time of text": (ALL, {"events.csv": GOOD + b"3,7,1,noon\n"}, "events.csv:5: 't' is 'noon'; allowed is seconds"),
    "negative time": (ALL, {"events.csv": GOOD + b"3,7,1,-5\n"}, "events.csv:5: 't' is '-5'; allowed is seconds since"),
    "before 1970 in ms": (
        (*ALL, "--time_unit", "ms"),
        {"events.csv": GOOD + b"3,7,1,-5\n"},
        "events.csv:5: 't' is '-5'; allowed is milliseconds since 1970",
    ),
    "a date that is none": (
        ALL,
        {"events.csv": b"u,i,a,t\n1,2,1,2024-01-01\n1,2,1,2024-02-30\n"},
        "csv:3: 't' is '2024",
    ),
    "several bad rows": (ALL, {"events.csv": GOOD + b"3,,1,1\n3,,1,1\n"}, r"csv:5: 'i' is empty.*\(2 such rows\)"),
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
    # one line per user
    "a user without items": (SEQUENCES, {"s.txt": b"a 1\n\nb \nc 2\n"}, "s.txt:3: 'item' is empty"),
    "a user on two lines": (
        SEQUENCES,
        {"s.txt": b"a 1 2\nb 1\na 3 4\n"},
        r"s.txt:3: 'user' is 'a'; allowed is .* a user has one line, or .* \(2 such rows\)",
    ),
    "sequences without the option": (
        (*OWN[:3], "s.txt", *OWN[4:], "--header", "u,i", "--delimiter", " "),
        {"s.txt": b"1 2\n3 4 5\n"},
        "s.txt:2: expected columns: 2 found: 3 or more; .* --sequences",
    ),
    "sequences and stars": ((*SEQUENCES, "--action", "a"), {"s.txt": b"1 2\n"}, "no column 'a'. It has: user, item"),
    "broken JSON": (JSON, {"s.txt": b"1 2\n", "a.json": b'{"2": [1],\n "3": [1,}\n'}, "a.json:2: Malformed JSON"),
    "JSON of no list": (JSON, {"s.txt": b"1 2\n", "a.json": b'{"2": "x"}'}, 'cannot read a.json: .*VARCHAR: "x"'),
    "JSON of other items": (JSON, {"s.txt": b"1 2\n", "a.json": b'{"9": [1]}'}, "a.json has no row for any of the 1"),
    "toys: an item that is no number": (
        TOYS,
        {"Toys_and_Games.txt": b"1 2 3\n2 x3\n"},
        "Toys_and_Games.txt:2: 'item' is .*; allowed is an integer",
    ),
    # built-in formats
    "ml: commas for tabs": (
        ML,
        {"u.data": b"1,2,3,4\n", "u.user": b"1|2|M|x|1\n"},
        "u.data:1: column 'user' holds '1,2,3,4'",
    ),
    "ml: an id beyond int64": (
        ML,
        {"u.data": b"1\t2\t3\t4\n1\t99999999999999999999\t3\t4\n", "u.user": b"1|2|M|x|1\n"},
        "u.data:2: column 'item' holds '99999999999999999999', which is not an integer of 64 bits",
    ),
    "ml: only one of two files": (
        ML,
        {"u.data": b"1\t2\t3\t4\n"},
        "does not hold the files of ml-100k: u.data, u.user or ml-100k.inter",
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
    "kuairand: a video that is no number": (
        KUAIRAND,
        kuairand() | {VIDEOS: KUAIRAND_VIDEOS + b"2,a,1,2,3,4,5,6.5\nx4,a,1,2,3,4,5,6.5\n"},
        f"{VIDEOS}:3: column 'video_id' holds 'x4', which is not an integer",
    ),
    "kuairand: nothing in a signal": (
        KUAIRAND,
        kuairand(first=KUAIRAND_HEADER + KUAIRAND_ROW.replace(b",1,0\n", b",,0\n")),
        f"{FIRST}:2: 'is_click, .*' is empty",
    ),
}

"""Mutated raw files and stores: a raw file gives a store that verifies, or a UserError; a store is refused."""

import gzip
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pytest

from hstu.base.errors import DataError, UserError
from hstu.data.datasets import DATASETS
from hstu.data.datasets.kuairand import ACTION_BITS
from hstu.data.preprocess import InteractionColumns, import_interactions, preprocess
from hstu.data.store.sequence_store import SequenceStore

_TOKENS = (
    *(b",", b"\n", b"\r\n", b'"', b'""', b"\t", b"|", b"::", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"nan", b"-1"),
    *(b"1e400", b"99999999999999999999", b"-9223372036854775808", b"NULL", b"\\N", b"2024-02-30"),
    *("é𝄞".encode(), b"0x10", b"1_000", b"+5", b"true"),
)  # fmt: skip


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The content with one to four random changes."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        until = min(len(data), at + chance.choice((1, 2, 7, 60)))
        match chance.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at:until]
            case 2:
                data[at:at] = data[at:until]
            case 3:
                data[at:at] = chance.choice(_TOKENS)
            case 4:
                data[at:until] = chance.choice(_TOKENS)
            case 5:
                data[at:at] = chance.randbytes(chance.choice((1, 3, 50)))
            case _:
                if chance.random() < 0.3:
                    del data[at:]
    return bytes(data)


def rows(
    chance: random.Random, columns: Callable[[int], Sequence[object]], delimiter: str, header: Sequence[str] = ()
) -> bytes:
    """Some lines of a table."""
    lines = [*([header] if header else []), *map(columns, range(chance.randint(1, 40)))]
    return "".join(delimiter.join(map(str, line)) + "\n" for line in lines).encode()


def own_table(folder: Path, chance: random.Random) -> Path:
    """A user's own table, mutated, as text or Parquet."""
    good = b"u,i,a,t\n" + rows(chance, lambda row: (f"u{row % 4}", row % 9, row % 3, 100 - row), ",")
    kind = chance.choice((".csv", ".csv", ".csv.gz", ".parquet"))
    file = folder / f"events{kind}"
    if kind == ".parquet":
        with duckdb.connect() as engine:
            engine.execute(f"COPY (SELECT i % 3 u, i % 7 i, i % 2 a, i t FROM range(50) r(i)) TO '{file}'")
        file.write_bytes(mutated(file.read_bytes(), chance))
    else:
        content = mutated(good, chance)
        file.write_bytes(mutated(gzip.compress(content), chance) if kind == ".csv.gz" else content)
    features: dict[str, Any] = {}
    if kind != ".parquet" and chance.random() < 0.5:
        items = b"i,year,tags\n" + rows(chance, lambda row: (row, 1990 + row, f"x|y{row}"), ",")
        (folder / "items.csv").write_bytes(mutated(items, chance))
        features = {"items": folder / "items.csv", "item_columns": ("year", "tags"), "lists": {"tags": "|"}}
        features |= {"event_columns": ("a",), "bins": {chance.choice(("a", "year")): 3}}
    action = None if features else "a"
    columns = InteractionColumns(
        interactions=file, user="u", item="i", action=action, time=chance.choice(("t", None)), **features
    )
    policy = chance.choice(("raise", "skip"))
    return import_interactions("mine", columns, output=folder / "store", bad_row_policy=policy)


def built_in(folder: Path, chance: random.Random) -> Path:
    """A built-in dataset with one mutated file."""
    name = chance.choice(("ml-100k", "ml-1m", "ml-20m", "kuairand-pure"))
    header = ("user_id", "video_id", "time_ms", *ACTION_BITS)
    users = DATASETS["kuairand-pure"].schema.context
    videos = DATASETS["kuairand-pure"].schema.item_features
    contents = {
        "u.data": rows(chance, lambda row: (row % 5, row % 7, 1 + row % 5, 10**9 + row), "\t"),
        "u.user": rows(chance, lambda row: (row, 20, "M", "other", "1234"), "|"),
        "u.item": rows(chance, lambda row: (row, f"Film {row} (1990)"), "|"),
        "ratings.dat": rows(chance, lambda row: (row % 5, row % 7, 1 + row % 5, 10**9 + row), "::"),
        "users.dat": rows(chance, lambda row: (row, "F", 25, 3, "1234"), "::"),
        "movies.dat": rows(chance, lambda row: (row, f"Film {row} (1990)", "Drama"), "::"),
        "ratings.csv": b"userId,movieId,rating,timestamp\n" + rows(chance, lambda row: (row % 5, row, 3.5, row), ","),
        "movies.csv": b"movieId,title,genres\n" + rows(chance, lambda row: (row, f'"Film, {row}"', "Drama"), ","),
        "video_features_basic_pure.csv": rows(
            chance, lambda row: (row, *videos[:-1], 10.5), ",", ("video_id", *videos)
        ),
        "user_features_pure.csv": rows(chance, lambda row: (row, *users[1:]), ",", users),
    } | {
        file: rows(chance, lambda row: (row % 4, row, 10**12 + row, *[row % 2] * 8), ",", header)
        for file in DATASETS["kuairand-pure"].raw_formats[0].files[:2]
    }
    raw_format = DATASETS[name].raw_formats[0]
    files = (*raw_format.files, *raw_format.optional_files)
    victim = chance.choice(files)
    for file in files:
        (folder / file).write_bytes(mutated(contents[file], chance) if file == victim else contents[file])
    policy = chance.choice(("raise", "skip"))
    return preprocess(name, raw_path=folder, output=folder / "store", bad_row_policy=policy)


def stored(folder: Path, chance: random.Random) -> Path:
    """A mutated store, which must be refused."""
    (folder / "events.csv").write_bytes(b"u,i,a,t\n" + rows(chance, lambda row: (f"u{row % 4}", row % 9, 1, row), ","))
    columns = InteractionColumns(interactions=folder / "events.csv", user="u", item="i", action="a", time="t")
    path = import_interactions("mine", columns, output=folder / "store")
    file = chance.choice(sorted(path.iterdir()))
    good = file.read_bytes()
    file.write_bytes(mutated(good, chance))
    if file.read_bytes() != good:
        SequenceStore.open(path).verify_contents()
        if file.name != "meta.json":  # there a blank more or less changes nothing
            raise AssertionError(f"{file.name} was changed and the store accepted")
    return path


@pytest.mark.parametrize("number", range(2_000_000, 2_000_000 + int(os.environ.get("FUZZ_CASES", "40"))))
def test_a_mutated_raw_file_or_store_is_used_or_refused_with_one_message(number: int, tmp_path: Path) -> None:
    """FUZZ_CASES: number of cases, for a long run."""
    chance = random.Random(number)
    kind = chance.choice((own_table, own_table, built_in, stored))
    try:
        SequenceStore.open(kind(tmp_path, chance)).verify_contents()
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error)
        if kind is not stored and isinstance(error, DataError):
            assert not (tmp_path / "store").exists(), "refused, and a store was left"

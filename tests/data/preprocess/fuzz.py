"""Feeds mutated raw files and stores to the readers; each must be used, or refused with a message.

python -m tests.data.preprocess.fuzz --seconds 300 [--seed 1] [--kind stored]
python -m tests.data.preprocess.fuzz --case 4711          # one case alone, in this process

A mutated raw file must give a store that verifies, or a UserError. A mutated store must be refused on opening or by
verify_contents.
Cases run in child processes; a case that kills its child or takes over a minute is a failure, too.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb

from hstu.base.errors import DataError, UserError
from hstu.data.datasets import DATASETS
from hstu.data.datasets.kuairand import ACTION_BITS
from hstu.data.preprocess import InteractionColumns, import_interactions, preprocess
from hstu.data.store.sequence_store import SequenceStore

_CASES_PER_CHILD = 40
_TIMEOUT_S = 60
_TOKENS = (
    *(
        b",",
        b"\n",
        b"\r\n",
        b'"',
        b'""',
        b"\t",
        b"|",
        b"::",
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"nan",
        b"-1",
        b"1e400",
    ),
    *(b"99999999999999999999", b"-9223372036854775808", b"NULL", b"\\N", b"2024-02-30"),
    *("é𝄞".encode(), b"0x10", b"1_000", b"+5", b"true"),
)


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


def rows(chance: random.Random, columns: Callable[[int], tuple[object, ...]], delimiter: str) -> bytes:
    """Some lines of a table."""
    lines = (delimiter.join(map(str, columns(row))) for row in range(chance.randint(1, 40)))
    return ("\n".join(lines) + "\n").encode()


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
    return import_interactions("mine", columns, output=folder / "store", bad_row_policy=policy)  # type: ignore[arg-type]


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
        "video_features_basic_pure.csv": ",".join(("video_id", *videos)).encode()
        + b"\n"
        + rows(chance, lambda row: (row, *videos[:-1], 10.5), ","),
        "user_features_pure.csv": ",".join(users).encode() + b"\n" + rows(chance, lambda row: (row, *users[1:]), ","),
    } | {
        file: ",".join(header).encode()
        + b"\n"
        + rows(chance, lambda row: (row % 4, row, 10**12 + row, *[row % 2] * 8), ",")
        for file in DATASETS["kuairand-pure"].raw_formats[0].files[:2]
    }
    raw_format = DATASETS[name].raw_formats[0]
    files = (*raw_format.files, *raw_format.optional_files)
    victim = chance.choice(files)
    for file in files:
        (folder / file).write_bytes(mutated(contents[file], chance) if file == victim else contents[file])
    policy = chance.choice(("raise", "skip"))
    return preprocess(name, raw_path=folder, output=folder / "store", bad_row_policy=policy)  # type: ignore[arg-type]


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


def run_case(number: int, work: Path, only: str | None) -> str:
    """Runs one case in a folder below ``work`` and returns "used" or "refused"; anything else is an exception."""
    chance = random.Random(number)
    kinds = (own_table, own_table, built_in, stored)
    kind = chance.choice([kind for kind in kinds if only is None or kind.__name__.startswith(only)])
    folder = Path(tempfile.mkdtemp(dir=work))
    try:
        SequenceStore.open(kind(folder, chance)).verify_contents()
        return f"{kind.__name__} used"
    except UserError as error:
        if not str(error).strip() or "\n" in str(error):
            raise AssertionError(f"not one clear message: {error!r}") from error
        if kind is not stored and isinstance(error, DataError) and (folder / "store").exists():
            raise AssertionError("refused, and a store was left") from error
        return f"{kind.__name__} refused"
    finally:
        shutil.rmtree(folder)


def run_child(first: int, work: Path, only: str | None) -> tuple[int, Counter[str], str | None]:
    """Runs cases in a child, up to the first failure; returns (their number, outcomes, error message or None)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(_TIMEOUT_S)
        with os.fdopen(write, "w", buffering=1) as pipe:
            for number in range(first, first + _CASES_PER_CHILD):
                pipe.write(f"begin {number}\n")
                try:
                    pipe.write(f"{run_case(number, work, only)}\n")
                except BaseException:
                    pipe.write(f"failed\n{traceback.format_exc()}")
                    os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answers:
        text = answers.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    outcomes = Counter(line for line in text.splitlines() if line.endswith((" used", " refused")))
    cases = text.count("begin ")
    if status == 0:
        return cases, outcomes, None
    return cases, outcomes, f"exit status {status} in {text[text.rindex('begin') :]}"


def main(argv: list[str] | None = None) -> int:
    """Runs the cases; returns 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=1, help="the first case is seed × 1,000,000")
    parser.add_argument("--case", type=int)
    parser.add_argument("--kind", choices=("own_table", "built_in", "stored"), help="only such cases")
    options = parser.parse_args(argv)
    logging.disable()
    with tempfile.TemporaryDirectory(prefix="fuzz") as work:
        return run_cases(options, Path(work))


def run_cases(options: argparse.Namespace, work: Path) -> int:
    """Runs one case or as many as the time allows; returns 0 if none failed."""
    if options.case is not None:
        print(run_case(options.case, work, options.kind))
        return 0
    begun, number, outcomes, failures = time.monotonic(), options.seed * 1_000_000, Counter[str](), 0
    while time.monotonic() - begun < options.seconds:
        cases, found, problem = run_child(number, work, options.kind)
        outcomes += found
        if problem:
            failures += 1
            print(problem, flush=True)
        number += cases
    seconds = time.monotonic() - begun
    print(f"{outcomes.total():,} cases in {seconds:.0f} s, {failures} failures: {dict(sorted(outcomes.items()))}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

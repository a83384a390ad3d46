"""Spark makes the stores of DuckDB, byte for byte, and refuses what it refuses, in the same words."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.base.errors import UserError
from hstu.data.datasets.spec import RawTables, Schema
from hstu.data.preprocess import build, preprocess
from hstu.data.preprocess.state import Base, BuildOptions
from hstu.data.store.sequence_store import SequenceStore
from tests.conftest import REPOSITORY
from tests.data.batches import test_requests
from tests.data.own_tables import own_store
from tests.data.preprocess import test_append, test_fuzz
from tests.data.preprocess.test_restart import SCRIPT, contents, generate, stopped_after_each_stage
from tests.serve.http_server import until

pyspark = pytest.importorskip("pyspark", reason='PySpark is missing: pip install ".[spark]"')
pytest.importorskip("sqlglot", reason='sqlglot is missing: pip install ".[spark]"')
needs_java = pytest.mark.skipif(not shutil.which("java"), reason="there is no Java: install a JRE of version 17 or 21")
pytestmark = needs_java


@pytest.fixture(scope="session")
def session() -> Iterator[Any]:
    """One Spark for all tests, as a session that spark-submit made. Small data need no optimizing compiler."""
    os.environ |= {"PYSPARK_PYTHON": sys.executable, "JDK_JAVA_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}
    given = {
        "spark.driver.memory": "600m",
        "spark.driver.host": "localhost",
        "spark.ui.enabled": "false",
        "spark.log.level": "OFF",
        "spark.ui.showConsoleProgress": "false",
        "spark.executorEnv.PYTHONPATH": str(REPOSITORY),
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    }
    made = pyspark.sql.SparkSession.builder.master("local[2]").config(map=given).getOrCreate()
    yield made
    made.stop()


def built(make: Any, *arguments: Any) -> tuple[Path | None, str | None]:
    """The path of a store, or the message of the error."""
    try:
        return make(*arguments), None
    except UserError as error:
        return None, f"{type(error).__name__}: {error}"


@pytest.fixture
def both(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each build is also made in Spark, to the same result."""
    original = build.build_store

    def build_twice(
        raw: RawTables, schema: Schema, options: BuildOptions, published: Mapping[str, float], base: Base | None = None
    ) -> Path:
        if options.engine == "spark" or (base and len(base.forgotten)):
            return original(raw, schema, options, published, base)
        other = replace(options, engine="spark", output=options.output.with_name(f"{options.output.name}.spark"))
        if base:
            shutil.copytree(options.output, other.output)
        (path, refused), (again, also) = (
            built(original, raw, schema, each, published, base and replace(base, events={}, codes={}))
            for each in (options, other)
        )
        assert also == refused
        if path is None or again is None:
            return original(raw, schema, options, published, base)  # raises it
        assert contents(again) == contents(path)
        shutil.rmtree(again)
        return path

    monkeypatch.setattr(build, "build_store", build_twice)


IDS = ["7", "007", "-7", "+7", str(2**63 - 1), str(2**63), "a b", "é", "\uffff", "𝄞", "'", "\\n", "N/A"]
ZONES = ("", "+02", " -0530", " Europe/Berlin")
TIMES = {
    "integers": lambda chance: str(1_600_000_000 + chance.randrange(90_000)),
    "fractions": lambda chance: f"16000{chance.randrange(10**5):05}.{chance.randrange(9)}",
    "dates": lambda chance: f"2024-0{chance.randrange(1, 4)}-11 10:00:0{chance.randrange(10)}{chance.choice(ZONES)}",
}
TEXTS = ("", "x", "X", "x y", "'", "unknown", "é|𝄞", "a|a|b", "NaN", "1e400")
NUMBERS = ("", "1.5", "-0.0", "nan", "3e38", " 4 ", "17", "0.1")
BAD = ("1e400", "inf", "1_0", "1d", "0x10", "noon", "\\N")


def awkward(folder: Path, chance: random.Random) -> dict[str, Any]:
    """Random tables with rows that are easily read in two ways. Returns the arguments of own_store."""
    users, items = (["3", "4", "-5", "60"] if chance.random() < 0.4 else [*IDS] for _ in range(2))
    clock = TIMES[chance.choice([*TIMES])]
    action = chance.choice((lambda: str(chance.randrange(4)), lambda: chance.choice(("buy", "view", "Über"))))
    is_split = chance.random() < 0.2

    def rows(number: int, **more: Any) -> str:
        lines = []
        for row in range(number):
            spoilt = chance.random() < 0.01
            given = {
                "u": chance.choice(users), "i": chance.choice(items), "a": chance.choice(BAD) if spoilt else action(),
                "t": chance.choice(BAD) if chance.random() < 0.01 else clock(chance), "e": chance.choice(TEXTS),
                "n": chance.choice(BAD) if chance.random() < 0.005 else chance.choice(NUMBERS),
                "b": str(chance.randrange(30) / 4), "s": ("train", "valid", "Test")[3 * row // number],
            }  # fmt: skip
            lines.append(given | {name: value() for name, value in more.items()})
        quoted = (",".join(f'"{value}"' for value in line.values()) for line in lines)
        return "\n".join([",".join(lines[0]), *quoted]) + "\n"

    files = [folder / f"events_{number}.csv" for number in range(chance.randint(1, 3))]
    for file in files:
        file.write_text(rows(chance.randint(20, 90)))
    given: dict[str, Any] = {"interactions": files, "event_columns": ("e",), "bad_row_policy": "skip"}
    if chance.random() < 0.3:
        given |= {"bad_row_policy": "raise"}
    if chance.random() < 0.7:
        given |= {"time": "t", "any_times": True} | ({"action": "a"} if chance.random() < 0.8 else {})
    if chance.random() < 0.5:
        given |= {"event_columns": ("e", "n", "b"), "numbers": ("n",), "bins": {"b": chance.choice((2, 7))}}
    if chance.random() < 0.5:
        table = "".join(f'"{item}","{chance.choice(TEXTS)}","{chance.choice(NUMBERS)}",1;{chance.choice("23x")}\n'
                        for item in chance.sample(items, 3) + items[:2])  # fmt: skip
        (folder / "items.csv").write_text("i,tags,price,vector\n" + table)
        columns = ("tags", "price", *["vector"] * (chance.random() < 0.5))
        lists = {"tags": "|", "vector": ";"} if "vector" in columns else {"tags": "|"}
        given |= {"items": folder / "items.csv", "item_columns": columns, "lists": lists, "vectors": columns[2:]}
        given |= {"numbers": (*given.get("numbers", ()), "price"), "all_items": chance.random() < 0.5}
        given |= {"titles": folder / "items.csv", "title": "tags"} if chance.random() < 0.5 else {}
    if chance.random() < 0.4:
        given |= {"context_columns": ("u", "s")}
    if {"time", "action"} <= given.keys() and chance.random() < 0.5:
        (folder / "requests.csv").write_text(rows(30, r=lambda: str(chance.randrange(9))))
        given |= {"requests": (folder / "requests.csv",)} | ({"request": "r"} if chance.random() < 0.5 else {})
    elif is_split and "time" not in given:
        given |= {"split": "s"} if "context_columns" not in given else {}
    elif "items" not in given and chance.random() < 0.5:
        given |= {"min_user_events": 2, "min_item_events": 3}
    return given


def equal_on(folder: Path, number: int) -> None:
    """Both engines on random tables."""
    chance = random.Random(number)
    with suppress(UserError):
        if number % 4 == 3:
            chance.choice((test_fuzz.own_table, test_fuzz.built_in))(folder, chance)
        else:
            own_store(folder, **awkward(folder, chance))


def test_an_awkward_table_gives_equal_stores_and_messages(both: None, tmp_path: Path) -> None:
    equal_on(tmp_path, 0)


def test_a_store_grows_as_in_duckdb(session: Any, tmp_path: Path) -> None:
    files, given = test_append.random_tables(tmp_path, np.random.default_rng(1), are_texts=True)
    own_store(tmp_path, files[0], **given)
    shutil.copytree(tmp_path / "store", tmp_path / "spark")
    grown = own_store(tmp_path, files[1], append=True, **given)
    same = own_store(tmp_path, files[1], store="spark", append=True, engine="spark", **given)
    assert contents(same.path) == contents(grown.path) and same.lineage == grown.lineage


def test_delta_and_iceberg_tables_give_equal_stores_that_grow_equally(both: None, tmp_path: Path) -> None:
    from tests.data.datasets import test_lakehouse as tables  # it says which package is missing

    delta = tables.delta(tmp_path / "d")
    tables.iceberg(tmp_path / "w")
    given: dict[str, Any] = tables.COLUMNS | {"interactions": [delta, tmp_path / "w/db/events"]}
    before = own_store(tmp_path, **given)
    tables.deltalake.write_deltalake(delta, tables.rows(7), mode="append")
    assert own_store(tmp_path, append=True, **given).num_events == before.num_events + 200


def test_without_java_the_error_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("u,i\n1,2\n")
    given = ["--dataset_name", "mine", "--interactions", "a.csv", "--user", "u", "--item", "i", "--engine", "spark"]
    environment = os.environ | {"JAVA_HOME": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), *given]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "error: --engine spark: no Spark starts at local[*]: [JAVA_GATEWAY_EXITED]" in run.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_further_awkward_tables_give_equal_stores_and_messages(both: None, tmp_path: Path) -> None:
    for number in (1, 2, *range(100, 115)):  # each takes Spark some seconds
        (tmp_path / str(number)).mkdir()
        equal_on(tmp_path / str(number), number)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2))
def test_a_store_grows_to_the_bytes_of_one_made_at_once(both: None, tmp_path: Path, seed: int) -> None:
    test_append.test_a_grown_store_has_the_bytes_of_one_made_at_once(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_requests_are_given_again_or_stay(both: None, tmp_path: Path) -> None:
    test_requests.test_requests_are_given_again_when_events_are_added(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_movielens_gives_equal_stores(both: None, tmp_path: Path, raw_data_dir: Path) -> None:
    preprocess("ml-1m", raw_path=raw_data_dir / "ml-1m", output=tmp_path / "store")


def ended_or_reached(stage: str, process: subprocess.Popen[bytes], journal: Path) -> bool:
    return process.poll() is not None or (journal.exists() and f'"{stage}"' in journal.read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    raw = generate(tmp_path / "raw", 60_000, "pure")
    command = [sys.executable, str(SCRIPT), "--dataset_name", "kuairand-pure", "--raw_path", str(raw)]
    journal = tmp_path / ".s.partial" / "scratch" / "journal.json"
    for number, stage in ((signal.SIGKILL, "users"), (signal.SIGTERM, "user_values_of_table")):
        told = (tmp_path / "told.txt").open("w+")
        process = subprocess.Popen([*command, "--output", "s", "--engine", "spark"], cwd=tmp_path, stderr=told)
        until(partial(ended_or_reached, stage, process, journal), 400)
        finished = json.loads(journal.read_text())["stages"]
        process.send_signal(number)
        assert process.wait(120) == (-number if number == signal.SIGKILL else 128 + number)
        told.seek(0)
        assert "Traceback" not in told.read()
        assert finished.items() <= json.loads(journal.read_text())["stages"].items()
    for engine, output in (("spark", "s"), ("duckdb", "t")):
        given = [*command, "--output", output, "--engine", engine]
        subprocess.run(given, cwd=tmp_path, check=True, timeout=300, capture_output=True)
    assert contents(tmp_path / "s") == contents(tmp_path / "t")


def kuairand_with_requests(folder: Path, rows: int, **given: Any) -> Path:
    """The store of a generated KuaiRand as an own table with features, whose second log is what to rank."""
    raw = folder / "raw"
    events, shown = sorted((raw if raw.exists() else generate(raw, rows, "pure")).glob("log_*"))
    videos, numbers = raw / "video_features_basic_pure.csv", ("play_time_ms", "video_duration")
    columns: dict[str, Any] = {"user": "user_id", "item": "video_id", "action": "is_click", "time": "time_ms"}
    columns |= {"context": raw / "user_features_pure.csv", "context_columns": ("user_active_degree", "user_id")}
    columns |= {"items": videos, "item_columns": ("tag", "author_id", "video_duration"), "lists": {"tag": ","}}
    columns |= {"event_columns": ("tab", "hourmin", "play_time_ms"), "numbers": numbers, "bins": {"hourmin": 5}}
    return own_store(folder, events, time_unit="ms", requests=(shown,), **columns, **given).path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_logs_give_equal_stores_with_and_without_requests(both: None, tmp_path: Path) -> None:
    made = SequenceStore.open(kuairand_with_requests(tmp_path, 300_000))
    assert made.num_requests > 1000 and made.num_events > 100_000
    preprocess("kuairand-pure", raw_path=tmp_path / "raw", output=tmp_path / "built_in")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stopped_in_each_stage_it_goes_on_and_ends_with_the_same_bytes(
    session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(kuairand_with_requests(tmp_path, 3000))
    make = partial(kuairand_with_requests, tmp_path, 3000, store="spark", engine="spark")
    made, stages = stopped_after_each_stage(monkeypatch, make)
    assert {"typed", "vocabulary_i1", "ranges e1", "events from 0", "candidates from 0"} <= set(stages)
    assert contents(made) == whole

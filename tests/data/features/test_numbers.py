"""Numbers and vectors of items and numbers of events, from users' own tables to the store."""

import tempfile
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.base.errors import DataError, UserError
from hstu.config.args import DatasetArgs, Task
from hstu.data.datasets.own import number_value, vector_value
from hstu.data.features import values as number_values
from hstu.data.features.values import signed_log, statistics_of_numbers, training_statistics
from hstu.data.sampling.samples import build_samples
from scripts.preprocess_dataset import main
from tests.conftest import write_small_store
from tests.data.own_tables import own_store
from tests.data.preprocess.test_features import make, write_tables

EVENTS = "u,i,t,watched\nb,x1,20,9.5\nb,x2,10,3\na,x1,5,nan\na,x3,7,\na,x1,9,-8e2\n"
ITEMS = "i,price,vector\nx1,1.5,1;2;-3\nx3,,\nx9,7,1;1;1\nx2, 4 ,.5;0;1e3\n"
BOTH: dict[str, Any] = {
    "item_columns": ("price", "vector"), "event_columns": ("watched",), "numbers": ("price", "watched"),
    "vectors": ("vector",), "lists": {"vector": ";"},
}  # fmt: skip
NAN = float("nan")


@pytest.mark.parametrize("windows", [{}, {"window_stride": 2}, {"window_stride": "random"}])
@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_statistics_are_those_of_what_is_trained_on(tmp_path: Path, task: Task, windows: dict[str, Any]) -> None:
    watched = [[1.0, 2, NAN, 4, 50, 60], [7.0, 8], [9.0, 10, 11, 120, 130]]
    lengths = [len(row) for row in watched]
    store = write_small_store(
        tmp_path / "store", [[0, 1, 2, 3, 4, 5][:n] for n in lengths], event_numbers={"watched": watched},
        item_numbers={"price": np.arange(6, dtype=np.float32)[:, None]},
    )  # fmt: skip
    args = DatasetArgs(dataset_name="toy", max_sequence_length=3, train_fraction=0.6, **windows)
    train = build_samples(store, args, task, "train", seed=3)
    found = training_statistics(store, ["price", "watched"], train)
    of_users = np.concatenate([watched[user] for user in set(train.user)])
    trained = {"retrieval": np.array([1.0, 2, 4, 9, 10, 11]), "ranking": of_users}[task]
    known = trained[~np.isnan(trained)]
    assert found["watched"].mean == [pytest.approx(known.mean())] and found["watched"].count == len(known)
    assert found["price"] == store.features["price"].statistics


numbers = st.one_of(st.none(), st.floats(-(2.0**90), 2.0**90, width=32), st.integers(-9, 9).map(float))
vectors = st.one_of(st.none(), st.lists(st.floats(-9, 9, width=16), min_size=2, max_size=2))
event_rows = st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 9), numbers, numbers)


@settings(max_examples=4)
@given(
    st.lists(event_rows, min_size=1, max_size=25),
    st.lists(st.tuples(st.integers(0, 5), numbers, vectors), max_size=8),
    st.booleans(),
)
def test_any_tables_give_the_numbers_of_a_plain_reference(
    rows: list[Any], of_item: list[Any], in_parquet: bool
) -> None:
    rows[0] = (*rows[0][:3], 2.5, 1.5)  # a column without any value is refused
    events = pd.DataFrame(rows, columns=["u", "i", "t", "watched", "weight"]).astype({"watched": "float32"})
    items = pd.DataFrame([(rows[0][1], 0.5, [1.0, 2.0]), *of_item], columns=["i", "price", "vector"])
    with tempfile.TemporaryDirectory() as folder:
        suffix = ".parquet" if in_parquet else ".csv"
        separator = {} if in_parquet else {"vector": "|"}
        texts = items.assign(vector=items.vector.map(lambda vector: "|".join(map(repr, vector)) if vector else None))
        write_tables(Path(folder), suffix, e=events, i=items if in_parquet else texts)
        store = own_store(
            Path(folder), Path(folder) / f"e{suffix}", time="t", items=Path(folder) / f"i{suffix}",
            item_columns=("price", "vector", "weight"), event_columns=("watched",), lists=separator,
            numbers=("price", "weight", "watched"), vectors=("vector",),
        )  # fmt: skip
        store.verify_contents()

    ordered = events.sort_values(["u", "t"], kind="stable")
    np.testing.assert_array_equal(store.sequence("watched"), ordered.watched.to_numpy(np.float32))
    ids = sorted(set(events.i))
    first = items.drop_duplicates("i").set_index("i").reindex(ids)
    np.testing.assert_array_equal(store.item_numbers("price")[:, 0], first.price.to_numpy(np.float32))
    vector = np.array([value if isinstance(value, list) else [NAN, NAN] for value in first.vector], np.float32)
    np.testing.assert_array_equal(store.item_numbers("vector"), vector)
    by_time = events.dropna(subset="weight").sort_values("t", kind="stable").drop_duplicates("i").set_index("i")
    weight = by_time.weight.reindex(ids).to_numpy(np.float32)
    np.testing.assert_array_equal(store.item_numbers("weight")[:, 0], weight)


@settings(max_examples=30)
@given(st.lists(st.floats(width=32, allow_infinity=False), min_size=1, max_size=40), st.integers(2, 9))
def test_statistics_are_exact_however_the_column_is_cut(column: list[float], chunk: int) -> None:
    values = np.array(column, dtype=np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(number_values, "_CHUNK", chunk)
        found = statistics_of_numbers(values[:, None])
    known = np.sort(values[~np.isnan(values)]).astype(np.float64)
    assert (found.count, found.missing) == (len(known), len(values) - len(known))
    if len(known):
        logs, ranks = signed_log(known), np.rint(np.linspace(0, len(known) - 1, 65)).astype(int)
        np.testing.assert_allclose([*found.mean, *found.std], [known.mean(), known.std()], rtol=1e-9, atol=1e-9)
        assert found.log_mean is not None and found.log_std is not None
        np.testing.assert_allclose([found.log_mean, found.log_std], [logs.mean(), logs.std()], rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(found.quantiles, known[ranks])


def test_the_command_line_knows_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.csv").write_text(EVENTS)
    (tmp_path / "i.csv").write_text(ITEMS)
    command = ["--dataset_name", "mine", "--interactions", str(tmp_path / "e.csv"), "--user", "u", "--item", "i"]
    command += ["--time", "t", "--items", str(tmp_path / "i.csv"), "--item_columns", "price,vector"]
    command += ["--event_columns", "watched", "--numbers", "price,watched", "--vectors", "vector"]
    command += ["--lists", "vector=;", "--output", str(tmp_path / "store")]
    assert main(command) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "features of items: price (number, 1 missing), vector (vector of 3, 1 missing)" in told
    assert "features of events: watched (number, 2 missing)" in told
    assert main([*command, "--numbers", "watched", "--bins", "price=2"]) == 3
    assert "--numbers was price,watched, it is now watched" in capsys.readouterr().err


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no feature": ({"numbers": ("prize",)}, "--numbers prize: 'prize' is not among --item_columns or --event_columns"),
    "also ranges": ({"bins": {"price": 3}}, "--numbers price: 'price' is among --bins, too"),
    "also a vector": ({"vectors": ("price",)}, "--numbers price: 'price' is among --vectors, too"),
    "a vector of events": ({"vectors": ("watched",)}, "'watched' is not among --item_columns; only items have vectors"),
    "a text without separator": (
        {"lists": {}},
        r"'vector' is VARCHAR, text; say in --lists what separates its numbers",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_that_do_not_go_together_are_refused(case: str, tmp_path: Path) -> None:
    given, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        make(tmp_path, EVENTS, ITEMS, **(BOTH | given))


BAD_DATA: dict[str, tuple[str, str, str]] = {
    "text for a number": (
        "9.5",
        "9.5 min",
        r"e\.csv:2: 'watched' is '9.5 min'; allowed is a finite number, or nothing",
    ),
    "text for a price": (" 4 ", "four", r"i\.csv:5: 'price' is 'four'; allowed is a finite number"),
    "an uneven vector": (".5;0;1e3", ".5;0", r"i\.csv:5: 'vector' is '.5;0'; allowed .* in each row.*\(3 in the first"),
    "an infinite vector": ("1;1;1", "1;1;-inf", r"i\.csv:4: 'vector' is '1;1;-inf'"),
    "no value of an item": ("x1,1.5,1;2;-3\nx3,,\nx9,7,1;1;1\nx2, 4 ,.5;0;1e3", "x3,,\nx9,7,1;1\n", "no item of the"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_numbers_that_are_none_are_refused_and_nothing_is_left(case: str, tmp_path: Path) -> None:
    right, wrong, message = BAD_DATA[case]
    with pytest.raises(DataError, match=message) as raised:
        make(tmp_path, EVENTS.replace(right, wrong), ITEMS.replace(right, wrong), **BOTH)
    assert "\n" not in str(raised.value)
    assert not [path.name for path in tmp_path.iterdir() if "store" in path.name]


def test_bad_rows_of_numbers_may_be_skipped(tmp_path: Path) -> None:
    events, items = EVENTS.replace("-8e2", "-8e200"), ITEMS.replace(".5;0;1e3", "2;2")
    store = make(tmp_path, events, items, bad_row_policy="skip", **BOTH)
    assert store.statistics["skipped_rows"] == {"unusable watched": 1, "unusable vector": 1}
    np.testing.assert_equal(store.item_numbers("price").tolist(), [[1.5], [NAN], [NAN]])
    assert store.num_events == 4


def test_what_is_no_number_becomes_unusable_and_nothing_becomes_missing() -> None:
    """The SQL of numbers and vectors, NULL for missing and NaN for unusable."""
    texts = ["1e2", " -3 ", "", None, "nan", "NaN", "inf", "-8e200", "x", "1;2", "1;;2", "1;nan", " "]
    rows = f"(SELECT unnest({texts!r}) AS i0)".replace("None", "NULL")
    as_number = number_value("i0")
    found = [row[0] for row in duckdb.execute(f"SELECT {as_number} FROM {rows}").fetchall()]
    np.testing.assert_equal(found, [100, -3, None, None, None, None, *[NAN] * 6, None])
    as_vector = vector_value("i0", "string_split(i0, ';')")
    found = [row[0] for row in duckdb.execute(f"SELECT {as_vector} FROM {rows}").fetchall()]
    np.testing.assert_equal(found, [[100], [-3], None, None, *[[NAN]] * 5, [1, 2], [NAN], [NAN], None])

"""scripts/factorize.py as a user calls it."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from hstu.data.features.initial_rows import find_initial_rows
from hstu.data.store.sequence_store import SequenceStore
from tests.conftest import write_small_store
from tests.train.tiny import tables_of, tiny_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import factorize as script

USERS, ITEMS, EVENTS = 120, 30, 20
RNG = np.random.default_rng(0)
KIND_OF_USER, KIND_OF_ITEM = RNG.choice([-1, 1], USERS), RNG.choice([-1, 1], ITEMS)
QUALITY = RNG.normal(0, 1, ITEMS)


def draw(held_out_as: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Items and stars of each user: more for better items and for those of the user's kind, who sees more of them."""
    rng = np.random.default_rng(1 + held_out_as)
    items, stars = [], []
    for kind in KIND_OF_USER:
        weights = np.where(kind == KIND_OF_ITEM, 4.0, 1.0)
        chosen = rng.choice(ITEMS, EVENTS, replace=False, p=weights / weights.sum())
        rated = 3 + 0.7 * QUALITY[chosen] + kind * KIND_OF_ITEM[chosen] + rng.normal(0, 0.3, EVENTS)
        items.append(chosen.tolist())
        stars.append(np.clip(np.round(rated), 0, 5).astype(int).tolist())
    return items, stars


def call(path: Path, task: str, store: SequenceStore, *arguments: str) -> int:
    run: Any = {"task_args": {"prediction_head_arch": [8, 6]}} if task == "ranking" else {}
    (path / "run.gin").write_text(tiny_config(task, store, path, **run).operative_gin())
    output = str(path / "items.parquet")
    return script.main(["--gin-config-file", str(path / "run.gin"), "--output", output, *arguments])


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    table = pq.read_table(path / "items.parquet")
    return table["id"].to_numpy(), np.array(table["vector"].to_pylist())


def write(path: Path, items: list[list[int]], stars: list[list[int]]) -> SequenceStore:
    return write_small_store(path, items, actions=stars, num_items=ITEMS + 1, num_actions=6)


def test_ratings_become_means_and_factors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write(tmp_path / "store", *draw())
    assert call(tmp_path, "ranking", store, "--columns", "3") == 0
    ids, vectors = read(tmp_path)
    assert ids.tolist() == list(range(1000, 1000 + ITEMS)), "an item without events is left out"
    assert abs(np.corrcoef(vectors[:, 0], QUALITY)[0, 1]) > 0.9
    assert abs(np.corrcoef(vectors[:, 1], KIND_OF_ITEM)[0, 1]) > 0.9
    for part in (vectors[:, 0], vectors[:, 1:]):
        assert np.sqrt(np.square(part).mean()) == pytest.approx(script.STD)
    said = capsys.readouterr().out
    assert "vectors of 3 numbers for 30 of 31 items, from 1,680 training ratings of 84 users" in said
    (table,) = (table for table in tables_of(store) if table.feature_names == ["item_id"])
    table = replace(table, initial_rows=str(tmp_path / "items.parquet"))
    (rows,) = find_initial_rows(store, [table], {table.table_name: 16}).values()
    rows.check()
    assert (rows.known, rows.unknown) == (ITEMS, 0)


def test_events_become_vectors_of_equal_length(tmp_path: Path) -> None:
    assert call(tmp_path, "retrieval", write(tmp_path / "store", *draw()), "--std", "0.5", "--columns", "2") == 0
    _, vectors = read(tmp_path)
    np.testing.assert_allclose(np.square(vectors).mean(1), 0.25, rtol=1e-5)
    assert abs(np.corrcoef(vectors[:, 1], KIND_OF_ITEM)[0, 1]) > 0.9


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_what_a_run_holds_out_changes_nothing(task: str, tmp_path: Path) -> None:
    (items, stars), (other_items, other_stars) = draw(), draw(held_out_as=1)
    first = write(tmp_path / "first", items, stars)
    assert call(tmp_path, task, first) == 0
    before = (tmp_path / "items.parquet").read_bytes()
    samples = script.build_samples(first, tiny_config(task, first, tmp_path).dataset, task, "train", 1234)
    trained = set(samples.user.tolist())
    assert len(trained) == (84 if task == "ranking" else USERS)
    for user in range(USERS):
        kept = (EVENTS if user in trained else 0) if task == "ranking" else EVENTS - 2
        items[user][kept:], stars[user][kept:] = other_items[user][kept:], other_stars[user][kept:]
    assert call(tmp_path, task, write(tmp_path / "second", items, stars)) == 0
    assert (tmp_path / "items.parquet").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--columns", "17"], "--columns 17: expected 2 to 16; the rows of the item table have 16 numbers"),
        (["--std", "0"], "--std 0.0: expected a number above 0"),
        (["--gin-bindings", "DatasetArgs.dataset_path = '/no/such/place'"], "no preprocessed data at /no/such/place"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path, "ranking", write(tmp_path / "store", *draw()), *arguments) in (2, 3)
    assert said in capsys.readouterr().err and not (tmp_path / "items.parquet").exists()


def test_without_scipy_the_command_to_install_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "csr_matrix", None)
    assert call(tmp_path, "ranking", write(tmp_path / "store", *draw())) == 1
    assert "pip install 'hstu[factorize]'" in capsys.readouterr().err

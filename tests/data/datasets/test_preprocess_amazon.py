"""Ratings of Amazon books in the raw format, generated."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hstu.base.errors import DataError
from hstu.data.preprocess import preprocess
from hstu.data.preprocess.report import format_report
from hstu.data.store.sequence_store import SequenceStore


@pytest.fixture
def raw(tmp_path: Path) -> pd.DataFrame:
    """Books with many and few ratings, days with several ratings of a user, and ids that look like numbers."""
    rng = np.random.default_rng(0)
    books = np.array([f"{number:010}" for number in range(30)])
    rows = pd.DataFrame(
        {
            "user": [f"A{number}" for number in rng.integers(0, 25, 300)],
            "item": rng.choice(books, 300, p=np.arange(1, 31) / 465),
            "rating": rng.integers(1, 6, 300).astype(float),
            "time": 1_369_699_200 + 86_400 * rng.integers(0, 20, 300),
        }
    ).drop_duplicates(["user", "item"])
    rows.to_csv(tmp_path / "ratings_Books.csv", header=False, index=False)
    return rows


def test_amazon_books_is_the_stable_sort_of_its_file(raw: pd.DataFrame, tmp_path: Path) -> None:
    store = SequenceStore.open(preprocess("Amazon_Books", raw_path=tmp_path, output=tmp_path / "store"))
    oracle = raw.sort_values(["user", "time"], kind="stable")
    assert oracle.duplicated(["user", "time"]).any()
    assert store.raw_ids("user_id").tolist() == sorted(raw.user.unique())
    assert store.raw_ids("item")[store.sequence("item")].tolist() == oracle.item.tolist()
    assert store.sequence("rating").tolist() == oracle.rating.tolist()
    assert store.sequence("timestamp").tolist() == oracle.time.tolist()
    assert "instead of 22,507,155" in format_report(store)


def test_amazon_books_as_a_core_is_not_compared_with_the_whole(raw: pd.DataFrame, tmp_path: Path) -> None:
    store = SequenceStore.open(preprocess("amzn-books", raw_path=tmp_path, output=tmp_path / "s", min_user_events=7))
    assert 0 < store.num_events < len(raw)
    assert "published" not in format_report(store)


def test_a_missing_file_and_a_bad_rating_say_what_to_do(
    raw: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"Get ratings_Books.csv from http://jmcauley.* into tmp_data/raw/amazon-books"):
        preprocess("amazon-books")
    (tmp_path / "ratings_Books.csv").write_text("A1,0001,5.0,1369699200\nA1,0002,4.5,1369699200\n")
    with pytest.raises(DataError, match=r"ratings_Books.csv:2: 'rating' is .*; allowed is 1 to 5"):
        preprocess("amazon-books", raw_path=tmp_path)

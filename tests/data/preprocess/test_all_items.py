"""--all_items: the items of the list of titles belong to the store even without events."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.base.errors import ConfigError, DataError
from hstu.data.preprocess import preprocess
from hstu.data.preprocess.report import format_report
from hstu.data.store.sequence_store import SequenceStore
from scripts.preprocess_dataset import main
from tests.conftest import REPOSITORY
from tests.data.own_tables import histories, own_store

ML_1M = REPOSITORY.parent / "shared" / "data" / "ml-1m"
EVENTS, TITLES = "u,i\n1,20\n1,10\n2,10\n", "i,name\n30,thirty\n10,ten\n15,fifteen\n30,again\n"


def make(folder: Path, events: str = EVENTS, titles: str = TITLES, **limits: Any) -> SequenceStore:
    (folder / "e.csv").write_text(events)
    (folder / "t.csv").write_text(titles)
    given: dict[str, Any] = {"all_items": True, "titles": folder / "t.csv", "title": "name"} | limits
    return own_store(folder, folder / "e.csv", **given)


@pytest.mark.parametrize("letter", ["", "A"])
def test_items_without_events_get_codes_among_the_others(tmp_path: Path, letter: str) -> None:
    texts = {"events": EVENTS.replace(",1", f",{letter}1").replace(",2", f",{letter}2")}
    texts["titles"] = "".join(letter * (line[0] != "i") + line for line in TITLES.splitlines(keepends=True))
    store = make(tmp_path, **texts)
    assert [str(raw).removeprefix(letter) for raw in store.raw_ids("i")] == ["10", "15", "20", "30"]
    assert store.sequence("i").tolist() == [2, 0, 0] and store.cardinality("i") == 4
    titles = store.titles()
    assert titles is not None and titles.tolist() == ["ten", "fifteen", "", "thirty"]
    store.verify_contents()


def test_reports_count_them_apart(tmp_path: Path) -> None:
    store = make(tmp_path)
    assert "users 2, items 2 and 2 without events, events 3" in format_report(store)
    assert store.statistics["sparsity"] == 1 - 3 / 4


def test_another_choice_does_not_fit_the_store(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path)
    with pytest.raises(DataError, match="--all_items was given, it is now not given"):
        make(tmp_path, all_items=False)


def test_a_list_of_items_is_needed_and_no_filter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--all_items keeps items without events, and --min_item_events"):
        make(tmp_path, min_item_events=2)
    with pytest.raises(ConfigError, match="--all_items: there is no list of items; for your own data give --items"):
        own_store(tmp_path, tmp_path / "e.csv", store="other", all_items=True)
    (tmp_path / "u.data").write_text("1\t2\t3\t4\n")
    (tmp_path / "u.user").write_text("1|20|M|other|1\n")
    command = f"--dataset_name ml-100k --raw_path {tmp_path} --output {tmp_path / 'ml'} --all_items".split()
    assert main(command) == 2
    (tmp_path / "u.item").write_text("".join(f"{movie}|Film (1990)|||{'|0' * 19}\n" for movie in (2, 5)))
    assert main(command) == 0
    store = SequenceStore.open(tmp_path / "ml")
    assert store.raw_ids("movie_id").tolist() == [2, 5] and histories(store) == {1: [2]}


@pytest.mark.skipif(not ML_1M.is_dir(), reason="needs the raw files of ML-1M")
def test_ml_1m_has_the_whole_catalogue(tmp_path: Path) -> None:
    store = SequenceStore.open(preprocess("ml-1m", raw_path=ML_1M, output=tmp_path / "all", all_items=True))
    counts = np.bincount(store.sequence("movie_id"), minlength=store.cardinality("movie_id"))
    assert len(counts) == 3883 and 0 < (counts > 0).sum() == store.statistics["items"] < 3883
    titles = store.titles()
    assert titles is not None and all(titles)

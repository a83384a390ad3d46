"""The preprocessing report, and its checks against the published statistics."""

import os
from pathlib import Path

import numpy as np
import pytest

from hstu.base.errors import EXIT_BAD_DATA
from hstu.data.preprocess import report
from hstu.data.preprocess.report import write_report
from hstu.data.store.sequence_store import SequenceStore
from scripts import preprocess_dataset
from tests.conftest import REPOSITORY, MakeStore


@pytest.fixture(scope="module")
def folder(ml_100k_store: SequenceStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(ml_100k_store, tmp_path_factory.mktemp("made") / "report").parent


def test_the_report_of_ml_100k_says_what_is_known_of_it(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    for found in (
        "users 943, items 1,682, events 100,000",
        "as published: users, items, events",
        "1997-09-20 03:05:10 UTC",
        "50 Star Wars (1977): 583",
        "4: 34,174",
        "M: 670, F: 273",
        "Drama: 725",
        "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
    ):
        assert found in text
    assert max(map(len, text.partition("## Rows")[2].partition("Made by")[0].splitlines())) <= 120, "fits a terminal"
    assert (os.listdir(folder), os.listdir(folder.parent)) == (["report.md"], ["report"]), "nothing is left beside it"


def test_the_table_in_the_documentation_is_what_the_program_writes(folder: Path) -> None:
    page = (REPOSITORY / "docs" / "datasets.md").read_text()
    shown = page.partition("From the report of ml-100k:")[2].partition("## ")[0].strip()
    assert len(shown.splitlines()) == 4
    assert shown in (folder / "report.md").read_text()


def test_a_store_without_statistics_is_an_error_that_says_what_to_do(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store([[0, 1]])
    monkeypatch.setattr(preprocess_dataset, "_make", lambda _: store.path)
    assert preprocess_dataset.main(["--dataset_name", "toy"]) == EXIT_BAD_DATA
    assert "meta.json is incomplete (KeyError('items'))" in capsys.readouterr().err


def test_ids_are_shown_and_not_run() -> None:
    page = report._table(("x",), [("<script>alert(1)</script> | `x` [a](b)\n\x1b[31mred" + " word" * 40,)])
    assert "<script>" not in page and "\x1b" not in page and r"\|" in page
    assert len(page.splitlines()) == 3, "a line break of an id does not end its row"


def test_counts_do_not_depend_on_chunks(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    store = make_store([rng.integers(0, 5, length).tolist() for length in rng.integers(1, 40, 20)])
    monkeypatch.setattr(report, "_CHUNK", 7)
    expected = np.bincount(store.sequence(store.item_feature), minlength=store.cardinality(store.item_feature))
    assert report._event_counts(store, store.item_feature).tolist() == expected.tolist()

"""The preprocessing report, its plots and its checks against the published statistics."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hstu.base.errors import DataError
from hstu.data.preprocess.report import heading, paragraph, table, write_report
from hstu.data.preprocess.statistics import equal_times, repeated_events, statistics_of
from hstu.data.store.sequence_store import SequenceStore
from tests.conftest import REPOSITORY

MakeStore = Callable[..., SequenceStore]


def test_the_report_of_ml_100k_says_what_is_known_of_it(ml_100k_store: SequenceStore, tmp_path: Path) -> None:
    text = write_report(ml_100k_store, tmp_path / "report").read_text()
    for line in (
        "| events | 100,000 | 100,000 | yes |",
        "All as published.",
        "| first event | 1997-09-20 03:05:10 UTC |",
        "| 50 | Star Wars (1977) | 583 | 0.58 % |",
        "| 4 | 34,174 | 34.17 % |",
        "| sex | 2 | M 670, F 273 |",
        "| skipped in all | 0 |",
    ):
        assert line in text
    assert sorted(os.listdir(tmp_path / "report")) == ["lengths.png", "popularity.png", "report.md"]
    for image in ("lengths.png", "popularity.png"):
        content = (tmp_path / "report" / image).read_bytes()
        assert content.startswith(b"\x89PNG") and 5_000 < len(content) < 60_000
    assert os.listdir(tmp_path) == ["report"], "nothing is left beside it"


@pytest.mark.parametrize("foreign", [{"report.md": "# Thesis"}, {"thesis.txt": ""}, {"lengths.png": ""}])
def test_only_a_report_is_replaced_by_a_report(foreign: dict[str, str], make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store([[1, 2]])
    store.statistics = statistics_of(np.diff(store.offsets()), 3, published={})
    write_report(store, tmp_path / "report")
    write_report(store, tmp_path / "report")
    for name, text in foreign.items():
        (tmp_path / "report" / name).write_text(text)
        if not text:
            (tmp_path / "report" / "report.md").unlink()
    before = {file.name: file.read_bytes() for file in (tmp_path / "report").iterdir()}
    with pytest.raises(DataError, match="the report would replace"):
        write_report(store, tmp_path / "report")
    assert {file.name: file.read_bytes() for file in (tmp_path / "report").iterdir()} == before


def test_the_table_in_the_documentation_is_what_the_program_writes(
    ml_100k_store: SequenceStore, tmp_path: Path
) -> None:
    page = (REPOSITORY / "docs" / "datasets.md").read_text()
    shown = page.partition("From the report of ml-100k:")[2].partition("## ")[0].strip()
    assert len(shown.splitlines()) == 3
    assert shown in write_report(ml_100k_store, tmp_path / "report").read_text()


def test_differences_from_the_published_figures_are_shown(ml_100k_store: SequenceStore, tmp_path: Path) -> None:
    ml_100k_store = SequenceStore.open(ml_100k_store.path)
    ml_100k_store.statistics["published"]["users"] = 944
    text = write_report(ml_100k_store, tmp_path / "report").read_text()
    assert "| users | 944 | 943 | no |" in text
    assert "Not the complete data, or another release of it." in text


def test_repeated_events_are_counted(make_store: MakeStore) -> None:
    items = [[1, 2, 1, 1, 1], [1], [1, 1]]
    times = [[5, 5, 5, 5, 6], [5], [7, 8]]
    assert repeated_events(make_store(items, timestamps=times)) == 2
    assert repeated_events(make_store(items, timestamps=times, actions=[[0, 0, 0, 1, 0], [0], [0, 0]])) == 1


def test_events_of_one_second_are_counted(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [[5, 5, 5, 6], [6], [6, 6], [7, 8, 8]]
    store = make_store([[0] * len(row) for row in times], timestamps=times)
    assert equal_times(store) == (4, 2), "the second and third user have two events at the end"
    monkeypatch.setattr("hstu.data.preprocess.statistics._CHUNK", 1)
    assert equal_times(store) == (4, 2)


def test_the_report_says_how_many_ends_the_file_decides(ml_100k_store: SequenceStore, tmp_path: Path) -> None:
    ties = {}
    for user in range(ml_100k_store.num_users):
        begin, end = ml_100k_store.offsets()[user : user + 2]
        ties[user] = np.diff(ml_100k_store.sequence("timestamp")[begin:end]) == 0
    events, users = equal_times(ml_100k_store)
    assert events == sum(int(tied.sum()) for tied in ties.values())
    assert users == sum(bool(tied[-1]) for tied in ties.values()) > 0
    line = f"| users whose last two events are of one second, so that the file decides which is last | {users} |"
    assert line in write_report(ml_100k_store, tmp_path / "report").read_text()


def test_ids_are_shown_and_not_run(make_store: MakeStore, tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script> | `x` [a](b)\n\x1b[31mred"
    page = heading(nasty) + table((nasty,), [(nasty,)]) + paragraph(nasty)
    assert "<script>" not in page and "\x1b" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and r"\n\\x1b\[31mred" in page
    assert len(page.splitlines()) == 5, "a line break of an id does not end its row"


def test_counts_do_not_depend_on_chunks(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    items = [rng.integers(0, 5, length).tolist() for length in rng.integers(1, 40, 20)]
    store = make_store(items, timestamps=[sorted(rng.integers(0, 9, len(row)).tolist()) for row in items])
    store.statistics = statistics_of(np.diff(store.offsets()), 5, published={})
    whole = write_report(store, tmp_path / "whole").read_text()
    monkeypatch.setattr("hstu.data.preprocess.statistics._CHUNK", 7)
    assert write_report(store, tmp_path / "chunks").read_text() == whole

"""The preprocessing report: what was left out, and a store without the counts that it shows."""

from pathlib import Path

import pytest

from hstu.base.errors import EXIT_BAD_DATA
from hstu.data.preprocess import forget
from hstu.data.preprocess.report import format_report
from hstu.data.store.sequence_store import SequenceStore
from scripts import preprocess_dataset
from tests.conftest import MakeStore
from tests.data.own_tables import own_store


def test_rows_and_users_that_were_left_out_are_counted(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("u,i,a\nx,1,2\nx,2,often\ny,1,-1\ny,2,1\n")
    (tmp_path / "users.txt").write_text("y\n")
    store = own_store(tmp_path, tmp_path / "e.csv", action="a", bad_row_policy="skip")
    assert format_report(store).endswith("\n  skipped rows: unusable action 2")
    left = SequenceStore.open(forget("mine", tmp_path / "users.txt", output=store.path))
    assert format_report(left).endswith("\n  forgotten users 1\n  skipped rows: unusable action 2")


def test_a_store_without_statistics_is_an_error_that_says_what_to_do(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store([[0, 1]])
    monkeypatch.setattr(preprocess_dataset, "_make", lambda _: store.path)
    assert preprocess_dataset.main(["--dataset_name", "toy"]) == EXIT_BAD_DATA
    assert "meta.json is incomplete (KeyError('items'))" in capsys.readouterr().err

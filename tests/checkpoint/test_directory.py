from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from hstu.checkpoint import directory as place
from hstu.checkpoint.directory import BEST, LATEST, by_preference, commit, delete_older, place_of, point, pointed_at
from hstu.checkpoint.manifest import MANIFEST
from tests.checkpoint.test_store import make_checkpoint


def made(directory: Path, *iterations: int) -> list[Path]:
    return [make_checkpoint(place_of(directory, iteration)) for iteration in iterations]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_one_committed_last_is_preferred_then_those_before_it_then_later_ones(tmp_path: Path) -> None:
    two, four, six, eight = made(tmp_path, 2, 4, 6, 8)
    assert by_preference(tmp_path) == [eight, six, four, two]
    point(tmp_path, LATEST, six)
    assert by_preference(tmp_path) == [six, four, two, eight]


def test_a_link_to_nothing_is_no_preference(tmp_path: Path) -> None:
    two, four = made(tmp_path, 2, 4)
    point(tmp_path, LATEST, place_of(tmp_path, 6))
    assert by_preference(tmp_path) == [four, two]


def test_links_are_relative_so_that_a_directory_can_be_moved(tmp_path: Path) -> None:
    (path,) = made(tmp_path / "here", 3)
    point(tmp_path / "here", LATEST, path)
    moved = (tmp_path / "here").rename(tmp_path / "there")
    assert pointed_at(moved, LATEST) == place_of(moved, 3)
    assert (moved / LATEST / MANIFEST).is_file()


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    paths = made(tmp_path, 1, 2, 3, 4, 5)
    point(tmp_path, LATEST, paths[4])
    point(tmp_path, BEST, paths[1])
    delete_older(tmp_path, 5, keep=2)
    assert names(tmp_path) == [BEST, *(f"iteration_{i:08d}" for i in (2, 4, 5)), LATEST]
    point(tmp_path, BEST, paths[4])
    delete_older(tmp_path, 5, keep=2)
    assert names(tmp_path) == [BEST, *(f"iteration_{i:08d}" for i in (4, 5)), LATEST]


def test_what_is_not_behind_the_new_commit_is_not_deleted(tmp_path: Path) -> None:
    made(tmp_path, 2, 4, 6, 8)
    delete_older(tmp_path, 4, keep=1)
    assert names(tmp_path) == [f"iteration_{i:08d}" for i in (4, 6, 8)]


def test_what_cannot_be_deleted_stays_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    made(tmp_path, 1, 2)
    monkeypatch.setattr(Path, "rename", refuse)
    delete_older(tmp_path, 2, keep=1)
    assert names(tmp_path) == [f"iteration_{i:08d}" for i in (1, 2)]
    assert "cannot delete the older checkpoint" in caplog.text and "iteration_00000001: [Errno 13]" in caplog.text


def test_a_deletion_that_was_interrupted_is_finished(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / ".deleting_iteration_00000001")
    made(tmp_path, 2, 3)
    delete_older(tmp_path, 3, keep=3)
    assert names(tmp_path) == [f"iteration_{i:08d}" for i in (2, 3)]


def test_beginning_clears_what_an_interrupted_save_has_left(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / ".writing_iteration_00000002")
    temporary = place.begin(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == [temporary.name] and not list(temporary.iterdir())


def test_a_damaged_checkpoint_is_set_aside_for_a_new_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (old,) = made(tmp_path, 4)
    (old / "data").write_bytes(b"x123456789")
    new = make_checkpoint(tmp_path / ".writing_iteration_00000004")
    with caplog.at_level(logging.WARNING):
        assert commit(new, 4) == old
    assert (old / "data").read_bytes() == b"0123456789"
    assert (tmp_path / "set_aside_iteration_00000004_1" / "data").read_bytes() == b"x123456789"
    assert f"{old / 'data'} is damaged" in caplog.text


def test_one_without_a_readable_manifest_too(tmp_path: Path) -> None:
    (old,) = made(tmp_path, 4)
    (old / MANIFEST).write_text(json.dumps({"version": 2}))
    commit(make_checkpoint(tmp_path / ".writing_iteration_00000004"), 4)
    assert names(tmp_path) == ["iteration_00000004", "set_aside_iteration_00000004_1"]

import errno
import json
import logging
from pathlib import Path

import pytest
import torch

from hstu.base.errors import DataError
from hstu.checkpoint import directory as folder
from hstu.checkpoint.directory import (
    BEST,
    LATEST,
    MANIFEST,
    DamagedCheckpoint,
    checkpoint_path,
    delete_older,
    describe_files,
    file_problems,
    link_target,
    read_manifest,
    restore_candidates,
    set_link,
    torch_save,
    write_manifest,
)
from hstu.checkpoint.find import candidates


def make_checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "data").write_bytes(b"0123456789")
    write_manifest(path, describe_files(path, [path / "data"]))
    return path


def make_checkpoints(directory: Path, *iterations: int) -> list[Path]:
    return [make_checkpoint(checkpoint_path(directory, iteration)) for iteration in iterations]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_auto_is_the_newest_complete_checkpoint_of_the_save_directory(tmp_path: Path) -> None:
    assert candidates("auto", str(tmp_path / "absent")) == []
    make_checkpoint(tmp_path / "iteration_00000009")
    newest = make_checkpoint(tmp_path / "iteration_00000010")
    make_checkpoint(tmp_path / ".writing_iteration_00000011")
    (tmp_path / "iteration_00000012").mkdir()
    assert candidates("auto", str(tmp_path))[0] == newest


def test_candidates_are_the_latest_commit_then_earlier_then_later_ones(tmp_path: Path) -> None:
    two, four, six, eight = make_checkpoints(tmp_path, 2, 4, 6, 8)
    assert restore_candidates(tmp_path) == [eight, six, four, two]
    set_link(tmp_path, LATEST, six)
    assert restore_candidates(tmp_path) == [six, four, two, eight]


def test_links_are_relative_so_that_a_directory_can_be_moved(tmp_path: Path) -> None:
    (path,) = make_checkpoints(tmp_path / "here", 3)
    set_link(tmp_path / "here", LATEST, path)
    moved = (tmp_path / "here").rename(tmp_path / "there")
    assert link_target(moved, LATEST) == checkpoint_path(moved, 3)
    assert (moved / LATEST / MANIFEST).is_file()


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    paths = make_checkpoints(tmp_path, 1, 2, 3, 4, 5)
    set_link(tmp_path, LATEST, paths[4])
    set_link(tmp_path, BEST, paths[1])
    delete_older(tmp_path, 5, keep=2)
    assert names(tmp_path) == [BEST, *(f"iteration_{i:08d}" for i in (2, 4, 5)), LATEST]
    set_link(tmp_path, BEST, paths[4])
    delete_older(tmp_path, 5, keep=2)
    assert names(tmp_path) == [BEST, *(f"iteration_{i:08d}" for i in (4, 5)), LATEST]


def test_checkpoints_of_later_iterations_are_not_deleted(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 2, 4, 6, 8)
    delete_older(tmp_path, 4, keep=1)
    assert names(tmp_path) == [f"iteration_{i:08d}" for i in (4, 6, 8)]


def test_a_checkpoint_that_cannot_be_deleted_stays_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    make_checkpoints(tmp_path, 1, 2)
    monkeypatch.setattr(Path, "rename", refuse)
    delete_older(tmp_path, 2, keep=1)
    assert names(tmp_path) == [f"iteration_{i:08d}" for i in (1, 2)]
    assert "cannot delete the older checkpoint" in caplog.text and "iteration_00000001: [Errno 13]" in caplog.text


def test_a_new_save_removes_what_an_interrupted_one_has_left(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / ".writing_iteration_00000002")
    temporary = folder.begin(checkpoint_path(tmp_path, 4))
    assert [path.name for path in tmp_path.iterdir()] == [temporary.name] and not list(temporary.iterdir())


def test_a_damaged_checkpoint_is_set_aside_for_a_new_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (old,) = make_checkpoints(tmp_path, 4)
    (old / "data").write_bytes(b"x123456789")
    make_checkpoint(tmp_path / ".writing_iteration_00000004")
    with caplog.at_level(logging.WARNING):
        folder.commit(old)
    assert (old / "data").read_bytes() == b"0123456789"
    assert (tmp_path / "set_aside_iteration_00000004_1" / "data").read_bytes() == b"x123456789"
    assert f"{old} is damaged or holds another state" in caplog.text


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "is missing"), (b"012345678", "has 9 bytes"), (b"0123456780", "is damaged")]
)
def test_a_changed_file_is_named(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = make_checkpoint(tmp_path / "c")
    (path / "data").unlink()
    if content is not None:
        (path / "data").write_bytes(content)
    (found,) = file_problems(path, read_manifest(path))
    assert str(path / "data") in found and problem in found


def test_the_format_of_the_manifest_stays(tmp_path: Path) -> None:
    digest = "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    checksum = "489191bf5e6b2a6fe06f1427aa0bc8ac884024aaaee7812e486c7527a5c4db44"
    files = {"data": {"bytes": 10, "sha256": digest}}
    path = make_checkpoint(tmp_path / "c")
    assert (path / MANIFEST).read_text() == json.dumps({"version": 2, "sha256": checksum, "files": files}, indent=1)


def test_any_changed_byte_of_the_manifest_itself_is_noticed(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c")
    content = (path / MANIFEST).read_bytes()
    for index, byte in enumerate(content):
        for other in {byte ^ 1, byte ^ 128, *b' \n01"'} - {byte}:
            (path / MANIFEST).write_bytes(content[:index] + bytes([other]) + content[index + 1 :])
            with pytest.raises(DataError, match=r"manifest\.json is damaged|written by a newer version"):
                read_manifest(path)


def test_a_manifest_of_a_newer_program_is_not_damaged(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c")
    (path / MANIFEST).write_text(json.dumps({"version": 99, "shards": []}))
    with pytest.raises(DataError, match=r"newer version .* version is 99, .* reads versions up to 2\. Update"):
        read_manifest(path)
    for version in (0, 1, 2.5, "3", True, None):
        (path / MANIFEST).write_text(json.dumps({"version": version, "files": {}}))
        with pytest.raises(DamagedCheckpoint, match="its version is"):
            read_manifest(path)


@pytest.mark.parametrize("name", ["../data", "/etc/passwd", "tensors/../../data"])
def test_a_manifest_lists_only_what_is_in_the_checkpoint(tmp_path: Path, name: str) -> None:
    path = make_checkpoint(tmp_path / "c")
    write_manifest(path, {name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(DamagedCheckpoint, match="which is not in the checkpoint"):
        read_manifest(path)


def test_a_file_that_is_not_listed_or_not_as_written_is_not_read(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c")
    (path / "date").write_text("stale")
    assert folder.listed_files(path, "dat*") == [path / "data"] == [folder.verified_file(path, "data")]
    with pytest.raises(DamagedCheckpoint, match=r"has no date in its manifest\.json"):
        folder.verified_file(path, "date")
    (path / "data").write_bytes(b"9876543210")
    with pytest.raises(DamagedCheckpoint, match="data is damaged"):
        folder.verified_file(path, "data")


@pytest.mark.parametrize("numbers", [1, 10**6])
def test_torch_save_reports_a_full_disk(numbers: int) -> None:
    with pytest.raises(OSError) as raised:
        torch_save({"tensor": torch.zeros(numbers)}, Path("/dev/full"))
    assert raised.value.errno == errno.ENOSPC

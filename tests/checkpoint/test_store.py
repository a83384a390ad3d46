from __future__ import annotations

import json
from pathlib import Path

import pytest

from hstu.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    describe_files,
    file_problems,
    read_manifest,
    write_manifest,
)
from hstu.checkpoint.store import find
from hstu.config.errors import DataError


def make_checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "data").write_bytes(b"0123456789")
    write_manifest(path, describe_files(path, [path / "data"]))
    return path


def test_nothing_is_loaded_where_nothing_is_asked_for(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "iteration_00000001")
    assert find("", str(tmp_path)) is None


def test_auto_takes_the_newest_complete_checkpoint_of_the_save_directory(tmp_path: Path) -> None:
    assert find("auto", str(tmp_path / "absent")) is None
    make_checkpoint(tmp_path / "iteration_00000009")
    newest = make_checkpoint(tmp_path / "iteration_00000010")
    make_checkpoint(tmp_path / ".writing_iteration_00000011")
    (tmp_path / "iteration_00000012").mkdir()
    assert find("auto", str(tmp_path)) == newest


def test_a_directory_of_checkpoints_means_the_newest_and_a_checkpoint_itself(tmp_path: Path) -> None:
    old, new = make_checkpoint(tmp_path / "iteration_1"), make_checkpoint(tmp_path / "iteration_2")
    assert find(str(tmp_path), "elsewhere") == new
    assert find(str(old), "elsewhere") == old


def test_a_named_directory_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no complete checkpoint in .*ckpt_load_dir"):
        find(str(tmp_path), str(tmp_path))


def test_an_intact_checkpoint_has_no_problems(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c")
    assert file_problems(path, read_manifest(path)) == []


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


def test_any_changed_byte_of_the_manifest_itself_is_noticed(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c")
    content = (path / MANIFEST).read_bytes()
    for place, byte in enumerate(content):
        for other in {byte ^ 1, byte ^ 128, *b' \n01"'} - {byte}:
            (path / MANIFEST).write_bytes(content[:place] + bytes([other]) + content[place + 1 :])
            with pytest.raises(DamagedCheckpoint, match=r"manifest\.json (is damaged|has format version)"):
                read_manifest(path)


def test_a_manifest_of_the_first_format_is_still_read(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c")
    files = read_manifest(path)
    (path / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=1))
    assert read_manifest(path) == files


def test_an_unreadable_manifest_is_an_error(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c")
    (path / MANIFEST).write_text('{"version": 1, "fi')
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        read_manifest(path)
    (path / MANIFEST).write_text(json.dumps({"version": 99, "files": {}}))
    with pytest.raises(DataError, match="format version 99"):
        read_manifest(path)

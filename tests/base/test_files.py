"""Files and directories are put in place whole, or not at all."""

from pathlib import Path

import pytest

from hstu.base.files import replace_text, written_aside


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_replaced_as_a_whole(tmp_path: Path, shared: bool) -> None:
    file = tmp_path / "file.txt"
    file.write_text("old")
    with written_aside(file, shared) as aside:
        aside.write_text("half")
        assert file.read_text() == "old"
        aside.write_text("new")
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_directory_appears_with_all_that_is_in_it(tmp_path: Path) -> None:
    with written_aside(tmp_path / "folder") as aside:
        (aside / "below").mkdir(parents=True)
        (aside / "below" / "file.txt").write_text("text")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "below" / "file.txt").read_text() == "text"


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text("old")
    with pytest.raises(ValueError, match="stop"), written_aside(file) as aside:
        aside.write_text("half")
        raise ValueError("stop")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_has_left_is_written_over(tmp_path: Path) -> None:
    with written_aside(tmp_path / "file.txt") as aside:
        left = aside
        aside.write_text("")
    (left / "of a directory").mkdir(parents=True)
    replace_text(tmp_path / "file.txt", "new")
    assert (tmp_path / "file.txt").read_text() == "new"

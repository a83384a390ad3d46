"""Files and directories are put in place whole, or not at all; a directory is locked for one process.

The structure of JSON files is accepted, or refused with the place that differs.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hstu.base.errors import ConfigError
from hstu.base.files import LOCK_FILE, DirectoryLock, replace_text, written_aside
from hstu.base.json_shape import check_shape


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


HOLD = """
import sys, time
from pathlib import Path
from hstu.base.files import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]), "Some.option")
print("locked", flush=True)
time.sleep(100)
"""


def test_a_second_lock_is_refused_and_names_the_option_and_the_holder(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path, "TrainerArgs.output_dir")
    with pytest.raises(ConfigError) as error:
        DirectoryLock(tmp_path, "TrainerArgs.output_dir")
    expected = rf"TrainerArgs.output_dir: .*{re.escape(str(tmp_path))}.* in use .*host .*, process {os.getpid()}, since"
    assert re.search(expected, str(error.value))
    lock.release()
    assert not list(tmp_path.iterdir())
    DirectoryLock(tmp_path, "Some.option").release()


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid}"):
            DirectoryLock(tmp_path, "Some.option")
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK_FILE).exists()  # left behind, and no lock
    DirectoryLock(tmp_path, "Some.option").release()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("content")
    (tmp_path / LOCK_FILE).symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        DirectoryLock(tmp_path, "Some.option")
    assert precious.read_text() == "content"


def test_a_forked_child_does_not_remove_the_lock(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path, "Some.option")
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK_FILE).exists()
    with pytest.raises(ConfigError):
        DirectoryLock(tmp_path, "Some.option")
    lock.release()


SHAPE = {"n": int, "tables?": {str: {"names": [str]}}, "rate?": float}


@pytest.mark.parametrize(
    "value", [{"n": 0}, {"n": 3, "tables": {}}, {"n": 1, "tables": {"a": {"names": ["x"]}}, "rate": 0.5, "more": None}]
)
def test_what_fits_is_accepted(value: Any) -> None:
    check_shape(value, SHAPE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "it is \\[\\]"),
        ({}, "it has no 'n'"),
        ({"n": True}, "it.n is True"),
        ({"n": 10**400}, "it.n is 10000"),
        ({"n": 1, "tables": {"a": {}}}, "it.tables.a has no 'names'"),
        ({"n": 1, "tables": {"a": {"names": ["x", 7]}}}, r"it.tables.a.names\[1\] is 7"),
        ({"n": 1, "tables": None}, "it.tables is None"),
        ({"n": 1, "rate": float("nan")}, "it.rate is nan"),
    ],
)
def test_the_first_place_that_differs_is_named(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        check_shape(value, SHAPE)
    assert len(str(caught.value)) < 200

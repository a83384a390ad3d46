import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hstu.base.errors import ConfigError
from hstu.base.files import LOCK_FILE, DirectoryLock

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

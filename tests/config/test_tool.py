"""Tools end without a traceback where there is no defect."""

import errno
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from hstu.base.errors import DataError
from hstu.config.cli import tool
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (DataError("no such file"), 3, "error: no such file\n"),
        (OSError(errno.EROFS, "Read-only file system", "/exports"), 3, "error: /exports: Read-only file system\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=str,
)
def test_a_mistake_a_place_that_cannot_be_used_and_ctrl_c_give_their_exit_code(
    error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @tool
    def main(_: Sequence[str] | None) -> int:
        raise error

    assert main([]) == code
    assert capsys.readouterr().err == told


def test_a_defect_keeps_its_traceback() -> None:
    @tool
    def main(_: Sequence[str] | None) -> int:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        main([])


@pytest.mark.parametrize("flag", ["--explain", "--print-config"])
def test_a_reader_that_leaves_ends_it_silently(flag: str) -> None:
    config = ["--gin-config-file", "configs/ml_1m_ranking.gin"] if flag == "--print-config" else []
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "pretrain_gr_ranking.py", flag, *config],
        stdout=writing,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")

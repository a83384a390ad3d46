"""The command line as the shell sees it: exit codes, what is printed where, how soon, and by which rank.

Tools end without a traceback where there is no defect.
"""

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hstu.base.errors import DataError
from hstu.config.cli import parse_command_line, tool
from hstu.config.option import problem
from tests.config.gin_files import OWN_DATA, RANKING, RETRIEVAL, changed, write
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    ("layers", "told"), [((2, 0), "[rank 1] bad configuration: "), ((0, 0), "bad configuration: ")]
)
def test_a_mistake_on_some_or_all_ranks_is_told_once(tmp_path: Path, layers: tuple[int, int], told: str) -> None:
    for rank, number in enumerate(layers):
        write(tmp_path, changed(RANKING, f"NetworkArgs.num_layers = {number}"), f"run{rank}.gin")
    script = write(
        tmp_path,
        "import os, time\n"
        "from hstu.base import errors\n"
        "from hstu.config.cli import parse_command_line\n"
        f"errors._TIME_TO_REPORT_S = {6 if layers[0] == 0 else 0}\n"  # rank 1 waits for nobody's report
        f"parse_command_line('ranking', ['--gin-config-file', f'{tmp_path}/run{{os.environ[\"RANK\"]}}.gin'])\n"
        "time.sleep(60)\n",  # torchrun ends the good rank
        "script.py",
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(torchrun, capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 1
    assert result.stderr.count("NetworkArgs.num_layers = 0: expected int, at least 1") == 1
    assert f"\n{told}" in f"\n{result.stderr}" and "exitcode  : 2" in result.stderr


def test_reading_a_file_imports_nothing_heavy() -> None:
    code = (
        "import importlib, pkgutil, sys, hstu.config\n"
        "from tests.config.gin_files import ALL_RULES\n"
        "for module in pkgutil.walk_packages(hstu.config.__path__, 'hstu.config.'):\n"
        "    importlib.import_module(module.name)\n"
        "hstu.config.cli.parse_command_line('ranking', ['--gin-config-file', 'configs/ml_1m_ranking.gin'], ALL_RULES)\n"
        "print({'torch', 'numpy', 'duckdb', 'pandas'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert (result.stdout, result.stderr) == ("set()\n", "")


def exit_of(task: str, *argv: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        parse_command_line(task, list(argv))  # type: ignore[arg-type]
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_without_a_file_it_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("retrieval") == 2
    assert "--gin-config-file ml_1m_retrieval " in capsys.readouterr().err


def test_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("ranking", "--gin-config", "x") == 2
    assert "unrecognized arguments: --gin-config x" in capsys.readouterr().err


def test_preflight_is_for_validation_that_is_not_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def preflight() -> list[Any]:
        return [lambda run: [problem(run.network, "num_layers", "too many for this machine")]]

    file = ["--gin-config-file", write(tmp_path, OWN_DATA)]
    parse_command_line("ranking", file, preflight=preflight)
    for more, code in (["--validate-only", "--quick"], 0), (["--validate-only"], 2), (["--quick"], 2):
        with pytest.raises(SystemExit) as exit:
            parse_command_line("ranking", [*file, *more], preflight=preflight)
        assert exit.value.code == code
    told = capsys.readouterr().err
    assert told.count("too many for this machine") == 1 and "--quick belongs to --validate-only" in told


def test_print_config_is_a_file_that_prints_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("ranking", "--gin-config-file", write(tmp_path, OWN_DATA), "--print-config") == 0
    printed = capsys.readouterr().out
    assert exit_of("ranking", "--gin-config-file", write(tmp_path, printed, "again.gin"), "--print-config") == 0
    assert capsys.readouterr().out == printed


def test_explain_prints_the_named_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("ranking", "--explain", "NetworkArgs", "RankingArgs") == 0
    printed = capsys.readouterr().out
    assert "hidden_dropout: float = 0.2   [at least 0, below 1]" in printed
    assert "prediction_head_arch: list[int] (required)" in printed
    assert "train_batch_size" not in printed


def test_explain_of_an_unknown_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("ranking", "--explain", "NetworkArg") == 2
    assert "did you mean 'NetworkArgs'?" in capsys.readouterr().err


def test_bindings_may_be_repeated_or_listed(tmp_path: Path) -> None:
    config = parse_command_line(
        "retrieval",
        [
            *("--gin-config-file", write(tmp_path, RETRIEVAL)),
            *("--gin-bindings", "TrainerArgs.seed = 1", "NetworkArgs.num_layers = 3"),
            *("--gin-bindings", "DatasetArgs.dataset_name = 'ml-20m'"),
        ],
    )
    assert (config.trainer.seed, config.network.num_layers, config.dataset.dataset_name) == (1, 3, "ml-20m")  # type: ignore[union-attr]


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

"""Every gin file that we ship, every complete one in the documentation, and those of users as they are, are valid."""

import re
from pathlib import Path
from typing import Any

import pytest

from hstu.base.errors import ConfigError
from hstu.config.args import DatasetArgs, Task
from hstu.config.cli import parse_command_line
from hstu.config.gin_io import load, read_and_check
from hstu.config.rules import validate
from tests.config.gin_files import ALL_RULES, write

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("**/*.gin"))
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))) if page.is_file()]
NEWLINE = "\n"
FENCE = re.compile(r"^```gin task=(ranking|retrieval)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def complete_files(page: Path) -> list[Any]:
    """The gin blocks of a page that are whole files, with the line where each begins."""
    text = page.read_text(encoding="utf-8")
    return [
        pytest.param(block[1], block[2], id=f"{page.relative_to(ROOT)}:{text.count(NEWLINE, 0, block.start()) + 1}")
        for block in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in complete_files(page)]
assert BLOCKS, "docs/configuration.md shows complete files in blocks marked ```gin task=..."


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_config_is_valid(path: Path) -> None:
    task: Task = "retrieval" if "retrieval" in str(path.relative_to(ROOT)) else "ranking"
    config = load([str(path)], [], task)
    parallel = config.tensor_parallel.tensor_model_parallel_size
    assert validate(config, world_size=parallel, rules=ALL_RULES) == []


def test_a_shipped_file_has_a_name_but_a_file_of_the_directory_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load([str(ROOT / "configs" / "ml_1m_retrieval.gin")], [], "retrieval")
    for name in ("ml_1m_retrieval", "ml_1m_retrieval.gin"):
        assert read_and_check([name], [], "retrieval", world_size=1) == (shipped, [])
    write(tmp_path, 'include "amazon_toys_retrieval"\nTrainerArgs.seed = 5\n', "ml_1m_retrieval.gin")
    own, warnings = read_and_check(["ml_1m_retrieval"], [], "retrieval", world_size=1)
    assert own == load([str(ROOT / "configs" / "amazon_toys_retrieval.gin")], ["TrainerArgs.seed = 5"], "retrieval")
    assert warnings[0].startswith(
        "--gin-config-file ml_1m_retrieval: reads ml_1m_retrieval.gin of this directory, and not"
    )
    with pytest.raises(
        ConfigError, match=r"no such file.* \(shipped files with similar names: ml_20m_retrieval_large,"
    ):
        load(["configs/ml_20m_retreival_large.gin"], [], "retrieval")


@pytest.mark.parametrize(("task", "text"), BLOCKS)
def test_documented_file_is_valid(task: str, text: str, tmp_path: Path) -> None:
    config = load([write(tmp_path, text)], [], task)  # type: ignore[arg-type]
    assert validate(config, world_size=config.tensor_parallel.tensor_model_parallel_size, rules=ALL_RULES) == []


FILES = sorted((Path(__file__).parent / "users").glob("*.gin"))
WARNED = {
    "benchmark_ranking": [
        "seqlen_dist = @lengths/RandomDistribution(): has no effect",
        "profile_step_start = 50: has no effect",
        "profile_step_end = 60: has no effect",
    ],
    "benchmark_ranking_host_memory": ["here the class of a table decides", "log_interval = 10: bound twice"],
    "criteo_ranking": ["here the class of a table decides"],
    "movielens_retrieval": ["seed = 1234: bound twice"],
}
"""File → parts of its warnings, in order; the other files have none."""


def task_of(file: Path) -> Task:
    return "retrieval" if file.stem.endswith("retrieval") else "ranking"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_users_file_is_valid_unchanged(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_command_line(task_of(file), ["--gin-config-file", str(file), "--validate-only"], ALL_RULES)
    captured = capsys.readouterr()
    assert exit_.value.code == 0, captured.err
    assert captured.out == f"OK: {file} describes a {task_of(file)} run for 1 rank\n"
    warnings, expected = captured.err.splitlines(), WARNED.get(file.stem, [])
    assert len(warnings) == len(expected), captured.err
    assert all(
        warning.startswith("warning: ") and part in warning for part, warning in zip(expected, warnings, strict=True)
    ), captured.err


def test_there_are_nine_and_the_newer_ones_give_history_and_candidates_apart() -> None:
    assert len(FILES) == 9
    lengths = {}
    for file in FILES:
        dataset = load([str(file)], [], task_of(file)).dataset
        if isinstance(dataset, DatasetArgs) and "max_history_seqlen" in file.read_text():
            lengths[file.stem] = dataset.max_sequence_length
    assert lengths == {"kuairand_27k_ranking": 8202, "kuairand_pure_ranking": 510, "movielens_retrieval": 200}

"""Gin files as users bring them from other trainers (users/) are valid as they are."""

from pathlib import Path

import pytest

from hstu.config.args import DatasetArgs, Task
from hstu.config.cli import parse_command_line
from hstu.config.gin_io import load
from tests.config.gin_files import ALL_RULES

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

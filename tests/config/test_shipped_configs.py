"""Every gin file that we ship, and every complete gin file in the documentation, is valid."""

import re
from pathlib import Path
from typing import Any

import pytest

from hstu.base.errors import ConfigError
from hstu.config.args import Task
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

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from hstu.config.args import CLASSES
from hstu.config.gin_io import load
from hstu.config.option import converted, field_problems
from scripts.check_docs import problems_of
from tests.conftest import REPOSITORY

ROWS = [
    [cell.strip() for cell in line[1:-1].split("|")]
    for line in (REPOSITORY / "docs" / "migration.md").read_text().partition("## Checkpoints")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| from")
]
"""Trainer (empty: that of the row above), what it has, and what it is here."""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "test.sh").touch()
    return tmp_path


def check(repository: Path, text: str) -> list[str]:
    document = repository / "README.md"
    document.write_text(text)
    return list(problems_of(document, repository))


def test_a_document_that_names_what_exists_has_no_problem(repository: Path) -> None:
    text = """[tests](scripts/test.sh) and [elsewhere](https://example.org/x), run `scripts/test.sh -x`.
    ```
    TrainerArgs.seed = 1
    DatasetArgs.max_history_seqlen = 200
    configs/<name>.gin
    ```
    ```text
    TrainerArgs has no parameter TrainerArgs.seeed
    ```
    """
    assert check(repository, text) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[guide](docs/guide.md#top)", "README.md: the link to docs/guide.md leads nowhere"),
        ("run `scripts/gone.sh`", "README.md: scripts/gone.sh does not exist"),
        ("```\ntorchrun pretrain_gr_gone.py\n```", "README.md: pretrain_gr_gone.py does not exist"),
        ("`TrainerArgs.seeed = 1`", "README.md: TrainerArgs has no parameter seeed"),
    ],
)
def test_what_does_not_exist_is_named(repository: Path, text: str, problem: str) -> None:
    assert check(repository, text) == [problem]


@pytest.mark.parametrize("row", range(len(ROWS)), ids=[there[:40] for _, there, _ in ROWS])
def test_each_row_for_users_of_another_trainer_holds(row: int, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, here = ROWS[row]
    for owner, name, value in re.findall(r"`([A-Z]\w+)\.(\w+)(?: = (.+?))?`", here):
        cls, field = CLASSES[owner], CLASSES[owner].__dataclass_fields__[name]
        assert not value or not field_problems(cls, field, converted(cls, field, ast.literal_eval(value)))
    for name in re.findall(r"`(configs/\S+)`", here):
        load([str(REPOSITORY / name)], [], None)
    for script in re.findall(r"`scripts/(\w+)\.py`", here):
        with pytest.raises(SystemExit, match="0"):
            import_module(f"scripts.{script}").main(["--help"])
        told = capsys.readouterr().out
        assert all(word in told for option in re.findall(r"`(--[^A-Z`]+)", here) for word in option.split())

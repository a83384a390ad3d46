import ast
import pickle
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import save

from hstu.base.errors import DataError
from hstu.checkpoint.find import locate
from hstu.config.args import CLASSES
from hstu.config.cli import parse_command_line
from hstu.config.gin_io import load
from hstu.config.option import converted, field_problems
from scripts import import_checkpoint
from scripts.check_docs import problems_of
from tests.conftest import REPOSITORY

ROWS = [
    [cell.strip() for cell in line[1:-1].split("|")]
    for line in (REPOSITORY / "docs" / "migration.md").read_text().partition("## Checkpoints")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| from")
]
"""Trainer (empty: that of the row above), what it has, and what it is here."""
REFUSED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "`pipeline.config`": ("pipeline.config", lambda path: path.write_text("train_config { num_epochs: 1 }")),
    "its `.gin` files": ("sasrec.gin", lambda path: path.write_text('train_fn.dataset_name = "ml-1m"')),
    "its YAML": ("sasrec.yaml", lambda path: path.write_text("epochs: 300")),
    "their YAML": ("train.yml", lambda path: path.write_text("train:\n  save_steps: 100")),
    "`model.ckpt-<n>`": ("model.ckpt-1", lambda path: save({"w": torch.ones(1)}, checkpoint_id=path, no_dist=True)),
    "a checkpoint of DLRM-v3 (MLPerf)": ("dlrm.pt", lambda path: torch.save({"w": torch.ones(1)}, path)),
    "`saved/*.pth`": ("SASRec.pth", lambda path: torch.save({"config": path, "state_dict": {}}, path)),
    "`save`, `save_checkpoint`": ("hstu.pkl", lambda path: path.write_bytes(pickle.dumps(path))),
}
"""What a row has that is refused here → name of such a file, and what writes it."""


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
def test_each_row_for_users_of_another_trainer_holds(
    row: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, there, here = ROWS[row]
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
    if here.startswith("refused"):
        peer = next(trainer for trainer, *_ in reversed(ROWS[: row + 1]) if trainer)
        file, write = tmp_path / REFUSED[there][0], REFUSED[there][1]
        write(file)
        for told in refusals(file, re.findall(r"`--from (\S+)`", here), capsys):
            assert re.split(r"\W", peer.lower())[0] in told.lower() and "docs/migration.md" in told


def refusals(file: Path, sources: list[str], capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    """What users are told who train with a file of options, or import or name a checkpoint."""
    if not sources:
        with pytest.raises(SystemExit, match="2"):
            parse_command_line("retrieval", ["--gin-config-file", str(file)])
    for source in sources:
        given = ["--from", source, str(file), "--gin-config-file", "ml_1m_retrieval", "--output", f"{file}.out"]
        assert import_checkpoint.main(given) == 2
        with pytest.raises(DataError) as told:
            locate(file)
        yield str(told.value)
    yield capsys.readouterr().err

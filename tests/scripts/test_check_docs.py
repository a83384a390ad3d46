from pathlib import Path

import pytest

from scripts.check_docs import problems_of


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

"""docs/datasets.md takes a stranger from a table to recommendations: its commands, exactly as written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.scripts.pages import blocks, follow

PAGE = (REPOSITORY / "docs" / "datasets.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## Your own data, end to end") :]
COMMANDS, PYTHON = blocks(SECTION, "bash"), blocks(SECTION, "python")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_works_as_written(tmp_path: Path) -> None:
    told = follow(tmp_path, COMMANDS)
    for line in (
        "users 400, items 200",
        "item sku, action stars, time bought_at, context user_id (400), town (3)",
        "every checksum and every value is right",
        "s-000",
    ):
        assert line in told
    assert re.search(r"A-\d{3}", told), "recommendations are in the shop's own ids"
    report = blocks(SECTION, "text")[0].splitlines()[1]
    assert report.strip() in told, "the page shows what the command says"
    assert float(re.findall(r"HR@10[ =:]+([\d.]+)", told)[-1]) > 0.2, "popularity has about 0.05"
    assert float(re.findall(r"AUC ([\d.]+)  GAUC", told)[-1]) > 0.7, "what the feed has shown can be ranked"
    subprocess.run([sys.executable, "-c", PYTHON[0]], cwd=tmp_path, check=True)

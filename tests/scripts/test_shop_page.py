"""docs/tutorials/a_shop.md: its commands, exactly as written."""

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.scripts.pages import blocks, follow

PAGE = (REPOSITORY / "docs" / "tutorials" / "a_shop.md").read_text(encoding="utf-8")
COMMANDS = blocks(PAGE, "bash")


def last(metric: str, told: str) -> float:
    return float(re.findall(rf"{re.escape(metric)} ([\d.]+)", told)[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_works_as_written(tmp_path: Path) -> None:
    told = follow(tmp_path, [command for command in COMMANDS if not re.match(r"python scripts/serve|curl", command)])
    for line in blocks(PAGE, "text")[1].splitlines()[:8]:
        assert line.replace("…/tmp_data/shop", "") in told.replace(f"{tmp_path}/tmp_data/shop", "")
    assert last("AUC/click", told) > 0.72 and last("HR@10", told) > 0.08
    assert re.search(r"0\.\d{3}  sku-\d{3}", told)
    assert "added to tmp_data/shop: 1550 events" in told
    assert (tmp_path / "exports" / "2026-02-24" / "serving" / "manifest.json").is_file()

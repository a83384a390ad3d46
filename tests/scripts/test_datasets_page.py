"""docs/datasets.md takes a stranger from a table to recommendations: its commands, exactly as written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "datasets.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## Your own data, end to end") :]
COMMANDS = re.findall(r"^```bash\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
PYTHON = re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)


def shown(text: str) -> list[str]:
    """The output blocks that the page shows."""
    return re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_works_as_written(tmp_path: Path) -> None:
    for name in ("hstu", "scripts", "pretrain_gr_ranking.py", "pretrain_gr_retrieval.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    told = ""
    for command in COMMANDS:
        script = f'set -e; PATH="{Path(sys.executable).parent}:$PATH"\n{command}'
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        told += done.stdout + done.stderr
    for line in (
        "users 400, items 200",
        "item sku, action stars, time bought_at, context user_id (400), town (3)",
        "every checksum and every value is right",
        "s-000",
    ):
        assert line in told
    assert re.search(r"A-\d{3}", told), "recommendations are in the shop's own ids"
    report = shown(SECTION)[0].splitlines()[1]
    assert report.strip() in told, "the page shows what the command says"
    assert float(re.findall(r"HR@10[ =:]+([\d.]+)", told)[-1]) > 0.2, "popularity has about 0.05"
    assert float(re.findall(r"AUC ([\d.]+)  GAUC", told)[-1]) > 0.7, "what the feed has shown can be ranked"
    subprocess.run([sys.executable, "-c", PYTHON[0]], cwd=tmp_path, check=True)

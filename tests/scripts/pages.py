"""Follows a page of the documentation as a reader would."""

import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY


def blocks(text: str, kind: str) -> list[str]:
    """The code blocks of one kind: "bash", "python" or "text"."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def follow(place: Path, commands: list[str]) -> str:
    """Run commands in ``place``, which then looks like a checkout. Returns what they print; each must succeed."""
    for name in ("hstu", "scripts", "pretrain_gr_ranking.py", "pretrain_gr_retrieval.py"):
        (place / name).symlink_to(REPOSITORY / name)
    told = ""
    for command in commands:
        script = f'set -e; PATH="{Path(sys.executable).parent}:$PATH"\n{command}'
        done = subprocess.run(["bash", "-c", script], cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        told += done.stdout + done.stderr
    return told

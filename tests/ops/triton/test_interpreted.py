"""Triton decides when it is imported whether it interprets: the tests of its kernels run in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.backends import INTERPRETED

ROOT = Path(__file__).parents[3]
SHARED = ("tests/ops/test_kernels.py", "tests/ops/triton")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_every_kernel_is_right_when_interpreted() -> None:
    pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[dev]'")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SHARED]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 20, done.stdout[-2000:]

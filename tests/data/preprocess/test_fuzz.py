"""A short run of fuzz.py; give it hours with --seconds."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


def fuzz(seconds: int, seed: int) -> str:
    command = [sys.executable, "-m", "tests.data.preprocess.fuzz", "--seconds", str(seconds), "--seed", str(seed)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds + 120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_mutated_raw_files_and_stores_are_used_or_refused() -> None:
    told = fuzz(seconds=1, seed=2)
    assert " 0 failures" in told and "refused" in told and "used" in told


@pytest.mark.slow
def test_mutated_raw_files_and_stores_for_longer() -> None:
    fuzz(seconds=60, seed=3)

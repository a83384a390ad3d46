"""A short run of fuzz.py; give it hours with --seconds."""

import subprocess
import sys

from tests.conftest import REPOSITORY


def test_mutated_raw_files_and_stores_are_used_or_refused() -> None:
    command = [sys.executable, "-m", "tests.data.preprocess.fuzz", "--seconds", "0.1", "--seed", "2"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failures" in done.stdout and "refused" in done.stdout and "used" in done.stdout

"""Runs the tests of Triton kernels in a process with TRITON_INTERPRET=1, which Triton reads when it is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.backends import INTERPRETED

ROOT = Path(__file__).parents[3]
SHARED = (
    "tests/ops/test_kernels.py",
    "tests/ops/test_add_layer_norm.py",
    "tests/ops/test_self_check.py",
    "tests/ops/triton",
    "tests/parallel/dynamic/test_triton_slots.py",
    "tests/parallel/test_attention_shares.py::test_kernels_compute_ranges_of_queries_alone",
)


pytestmark = pytest.mark.skipif(INTERPRETED, reason="this is the interpreting process")


def interpret(*arguments: str, timeout_s: int) -> int:
    """Run tests in the interpreting process; all must pass. Returns their number."""
    pytest.importorskip("triton", reason="NEEDS TRITON: pip install -e '.[cpu,dev]'")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    return int(passed[1]) if passed else 0


@pytest.mark.timeout(900)
def test_every_kernel_is_right_when_interpreted() -> None:
    kept = "tests/ops/test_layer.py::test_what_is_kept_is_the_formula_to_the_byte"
    layers = [f"{kept}[triton-{changes}-0.2-None-later]" for changes in ({}, {"recompute_layer": True})]
    assert interpret(*SHARED, *layers, timeout_s=880) >= 60


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_long_sequences_and_the_self_check_are_right_when_interpreted() -> None:
    assert interpret(*SHARED, "-m", "slow", "-k", "float64 or all_kernels_pass", timeout_s=880) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_layer_of_interpreted_kernels_is_right_and_is_recomputed_with_the_same_bits() -> None:
    layers = ("tests/model/test_layer.py", "tests/ops/test_layer.py")
    assert interpret(*layers, timeout_s=880) == 108

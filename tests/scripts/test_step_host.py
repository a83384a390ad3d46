"""The benchmark of a step's host time runs the trainer's own step, and charges all of its time to parts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

pytest.importorskip("cutlass")

pytestmark = pytest.mark.slow

SMALL = (
    "NetworkArgs.num_layers = 2",
    "NetworkArgs.hidden_size = 64",
    "NetworkArgs.kv_channels = 32",
    "items/FeatureArgs.max_sequence_length = 8",
    "item/EmbeddingArgs.item_vocab_size_or_capacity = 50",
    "user/EmbeddingArgs.item_vocab_size_or_capacity = 50",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output: Path = tmp_path_factory.mktemp("host") / "step.json"
    command = [sys.executable, "scripts/bench/step_host.py", "--steps", "3", "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--bindings", *SMALL], cwd=REPOSITORY, env=environment, check=True, timeout=120)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_the_parts_of_a_step_are_all_of_it(report: dict[str, Any]) -> None:
    parts = report["parts_ms"]
    assert 0 < report["step_ms"]["fastest"] <= report["step_ms"]["median"] < 2 * sum(parts.values())
    assert {"look-up in the tables", "attention forward", "attention backward", "optimizers", "finite check"} <= set(
        parts
    )
    assert all(ms > 0 for ms in parts.values())


def test_launches_are_those_of_the_layers_and_the_inputs(report: dict[str, Any]) -> None:
    per_layer = {"norm_mul_dropout_forward": 1, "norm_mul_dropout_backward": 1, "linear_silu": 1}
    launches = report["triton_launches"]
    assert {name: launches[name] for name in per_layer} == {name: 2 * count for name, count in per_layer.items()}
    assert report["cutlass_launches"] == 2 * 3
    assert 0 < report["triton_binder_ms"] < 20

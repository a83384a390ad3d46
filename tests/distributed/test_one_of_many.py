"""What one rank of a large world does must not grow with the number of ranks, beyond the sizes of what it receives."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.distributed.launch import REPOSITORY

FEW, MANY = 16, 128
SMALL = [f"{table}/EmbeddingArgs.item_vocab_size_or_capacity = 16384" for table in ("item", "user")]


def phases(task: str, world_size: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.distributed.one_of_many", "--task", task, "--rank", "0"]
    done = subprocess.run(
        [*command, "--world-size", str(world_size), "--gin-bindings", *SMALL],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found["phases"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_counts_of_a_rank_are_those_of_a_small_world(task: str) -> None:
    few, many = phases(task, FEW), phases(task, MANY)

    for name, phase in many.items():
        for count in ("groups", "store_operations", "collectives"):
            assert phase[count] == few[name][count], f"{count} during {name}"
    assert many["10 steps"]["pickled_bytes"] == 0

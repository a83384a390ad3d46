"""Runs that are killed at seeded points and started again.

Every restart resumes from a commit, repeats no more iterations than allowed, ends with bit for bit the weights of the
undisturbed run, and leaves no temporary files.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import Launch, run_ranks, run_to_their_ends
from tests.reliability.kill_cases import Kill, run
from tests.train.tiny import TinyOptions

ITERATIONS, INTERVAL, KEPT = 13, 3, 2
KILLS = 3
PARTS = (".deleting_", "latest", "os.rename", "manifest.json", "/tensors", "")
"""What is in the name of an operation on files that belongs to a part of a save; the first that fits counts."""


def points(ranks: int, undisturbed: list[dict[str, Any]], seed: int) -> Iterator[Kill]:
    """Kills of all kinds in turn, each at a seeded file operation, forward pass or time."""
    rng = random.Random(seed)
    for number in range(rng.randrange(100), 1000):
        rank = rng.randrange(ranks)
        seen = undisturbed[rank]
        kinds: dict[str, list[int]] = {}
        for index, operation in enumerate(seen["files"], 1):
            kinds.setdefault(next(part for part in PARTS if part in operation), []).append(index)
        choices = [Kill(rank, file=rng.choice(indices)) for indices in kinds.values()]
        choices += [Kill(rank, forward=rng.randint(1, seen["forwards"]))] * 2
        choices += [Kill(rank, after_s=rng.uniform(0, seen["seconds"]))]
        yield choices[number % len(choices)]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "background"), [(1, True), (2, False), (3, True)])
def test_a_killed_run_resumes_from_its_last_commit_and_ends_with_the_same_weights(
    store: str, tmp_path: Path, ranks: int, background: bool
) -> None:
    trainer = {
        "train_batch_size": 4,
        "max_train_iters": ITERATIONS,
        "eval_interval": 4,
        "ckpt_save_interval": INTERVAL,
        "ckpt_keep_last": KEPT,
        "ckpt_load_dir": "auto",
        "ckpt_async": background,
    }
    options: TinyOptions = {"trainer": trainer, "network": {"hidden_dropout": 0.2}}
    launch = Launch(ranks, 120)
    undisturbed = run_ranks(launch, run, None, store, str(tmp_path / "undisturbed"), **options)
    killed = 0
    for number, kill in enumerate(points(ranks, undisturbed, seed=11)):
        output = tmp_path / str(number)
        others = tuple(rank for rank in range(ranks) if rank != kill.rank)
        run_to_their_ends(replace(launch, lasting=others), run, kill, store, str(output), **options)
        if not (output / "killed").exists():  # it ended before
            continue
        reached = json.loads((output / "killed").read_text())["iteration"]
        again = run_ranks(launch, run, None, store, str(output), **options)[0]
        assert again["resumed_from"] in (*range(0, ITERATIONS, INTERVAL), ITERATIONS), kill
        assert reached - again["resumed_from"] <= INTERVAL * (2 if background else 1), kill
        assert again["weights"] == undisturbed[0]["weights"], kill
        names = sorted(path.name for path in (output / "checkpoints").iterdir())
        assert names == ["iteration_00000012", "iteration_00000013", "latest"], kill
        killed += 1
        if killed == KILLS:
            return

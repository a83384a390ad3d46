"""Kill runs at seeded points and start them again: ``python -m tests.reliability.kills --points 100``.

The kills are divided among the numbers of ranks (``--ranks``), with and without ``ckpt_async``. Every restart must
resume from a commit, repeat no more iterations than allowed, end with bit for bit the weights of the undisturbed run,
and leave no temporary files.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.conftest import write_small_store
from tests.distributed.launch import Launch, run_ranks, run_to_their_ends
from tests.reliability.kill_cases import Kill, run
from tests.train.tiny import TinyOptions, walks

TIMEOUT_S = 120
ITERATIONS, INTERVAL, KEPT = 13, 3, 2
TRAINER = {
    "train_batch_size": 4,
    "max_train_iters": ITERATIONS,
    "eval_interval": 4,
    "ckpt_save_interval": INTERVAL,
    "ckpt_keep_last": KEPT,
    "ckpt_load_dir": "auto",
}


@dataclass
class Setting:
    """One kind of runs, and the results of the undisturbed run."""

    ranks: int
    background: bool
    store: str
    undisturbed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.ranks} rank{'s'[: self.ranks - 1]}, {'in the background' if self.background else 'waiting'}"

    @property
    def launch(self) -> Launch:
        return Launch(self.ranks, TIMEOUT_S)

    @property
    def options(self) -> TinyOptions:
        return {"trainer": TRAINER | {"ckpt_async": self.background}, "network": {"hidden_dropout": 0.2}}


@dataclass(frozen=True)
class Outcome:
    """The result of one kill."""

    where: str
    lost: int
    """Number of iterations that were repeated."""
    problems: tuple[str, ...]


def where_of(report: dict[str, Any]) -> str:
    """Return the part of the run in which it was killed. ``report``: what the rank wrote before it died."""
    operation, stage = report["what"], report["stage"]
    if operation in ("forward", "a moment"):
        part = "an evaluation" if stage.startswith("evaluating") else f"a {stage}" if stage[0] != "s" else stage
        return f"{part}, a save in flight" if report["in_flight"] else part
    for pattern, part in (
        (".deleting_", "deleting an old checkpoint"),
        ("latest", "pointing latest at it"),
        ("os.rename", "the rename"),
        ("manifest.json", "writing the manifest"),
        ("/tensors", "writing tensors"),
    ):
        if pattern in operation:
            return part
    return "writing the other files"


def points(setting: Setting, number: int, seed: int) -> Iterator[Kill]:
    """Yield kills of all kinds in turn, each at a seeded file operation, forward pass or time."""
    rng = random.Random(f"{seed} {setting.name}")
    first = rng.randrange(100)
    for index in range(first, first + number):
        rank = rng.randrange(setting.ranks)
        seen = setting.undisturbed[rank]
        kinds: dict[str, list[int]] = {}
        for index_of_operation, operation in enumerate(seen["files"], 1):
            report = {"what": operation, "stage": "", "in_flight": False}
            kinds.setdefault(where_of(report), []).append(index_of_operation)
        choices = [Kill(rank, file=rng.choice(indices)) for indices in kinds.values()]
        choices += [Kill(rank, forward=rng.randint(1, seen["forwards"]))] * 2
        choices += [Kill(rank, after_s=rng.uniform(0, seen["seconds"]))]
        yield choices[index % len(choices)]


def prepare(setting: Setting, folder: Path) -> None:
    """Run without a kill."""
    output = str(folder / "undisturbed")
    setting.undisturbed = run_ranks(setting.launch, run, None, setting.store, output, **setting.options)


def try_point(setting: Setting, kill: Kill, output: Path) -> Outcome | None:
    """Kill a run and start it again. Returns None if the run ended before the kill."""
    others = tuple(rank for rank in range(setting.ranks) if rank != kill.rank)
    launch = replace(setting.launch, lasting=others)
    run_to_their_ends(launch, run, kill, setting.store, str(output), **setting.options)
    if not (output / "killed").exists():
        return None
    report = json.loads((output / "killed").read_text())
    again = run_ranks(setting.launch, run, None, setting.store, str(output), **setting.options)[0]
    lost = report["iteration"] - again["resumed_from"]
    problems = []
    if again["resumed_from"] not in (*range(0, ITERATIONS, INTERVAL), ITERATIONS):
        problems.append(f"resumed from iteration {again['resumed_from']}, which is not a commit")
    if lost > INTERVAL * (2 if setting.background else 1):
        problems.append(f"lost {lost} iterations")
    if again["weights"] != setting.undisturbed[0]["weights"]:
        problems.append("the final weights differ")
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    if names != ["iteration_00000012", "iteration_00000013", "latest"]:
        problems.append(f"left {', '.join(names)}")
    return Outcome(where_of(report), lost, tuple(problems))


def outcomes(setting: Setting, number: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """Yield the outcomes of ``number`` kills."""
    prepare(setting, folder)
    done = 0
    for index, kill in enumerate(points(setting, 2 * number, seed)):
        output = folder / f"point{index}"
        outcome = try_point(setting, kill, output)
        shutil.rmtree(output, ignore_errors=True)
        if outcome is not None:
            done += 1
            yield outcome
        if done == number:
            return


def main(argv: Sequence[str] | None = None) -> int:
    """Try all points; return 1 if a restart failed a check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    options = parser.parse_args(argv)
    begun, failed, tried = time.monotonic(), 0, 0
    kinds = [(ranks, background) for ranks in options.ranks for background in (False, True)]
    for number, (ranks, background) in enumerate(kinds):
        with tempfile.TemporaryDirectory() as folder:
            write_small_store(Path(folder) / "store", **walks(31))
            setting = Setting(ranks, background, str(Path(folder) / "store"))
            parts: Counter[str] = Counter()
            lost = []
            share = options.points // len(kinds) + (number < options.points % len(kinds))
            for outcome in outcomes(setting, share, options.seed, Path(folder)):
                parts[outcome.where] += 1
                lost.append(outcome.lost)
                for problem in outcome.problems:
                    print(f"FAILED {setting.name}, killed in {outcome.where}: {problem}", flush=True)
                failed, tried = failed + bool(outcome.problems), tried + 1
        print(f"{setting.name}: {sum(parts.values())} kills, lost {min(lost)} to {max(lost)} iterations;", end=" ")
        print(", ".join(f"{part} {times}" for part, times in parts.most_common()), flush=True)
    print(f"{tried - failed} of {tried} good, every {INTERVAL} iterations saved, {time.monotonic() - begun:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

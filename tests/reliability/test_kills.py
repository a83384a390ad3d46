"""Runs that are killed at seeded points and started again, and runs that are started where another one is writing.

Every restart resumes from a commit, repeats no more iterations than allowed, ends with bit for bit the weights of the
undisturbed run, and leaves no temporary files.
"""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import pytest
import torch

from hstu.checkpoint.directory import check_files, complete_checkpoints
from hstu.checkpoint.state import TrainState
from hstu.config.run_config import RunConfig
from hstu.model.ranking import RankingDense
from hstu.observe import run_directory
from hstu.observe.records import read_metrics
from hstu.parallel.data_parallel import unwrap_dense
from hstu.parallel.mesh import Mesh
from hstu.train import builder, main
from hstu.train.trainer import Trainer
from tests.distributed.failure_cases import run_with
from tests.distributed.launch import REPOSITORY, Launch, run_ranks, run_to_their_ends
from tests.distributed.pipeline_cases import digest
from tests.train.tiny import TinyOptions, skip_measuring_the_peak, tiny_config

_ONE_PATH = ("open", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir")
_TWO_PATHS = ("os.rename", "os.symlink")


@dataclass(frozen=True)
class Kill:
    """When a rank is killed: at an operation on files or at a forward pass, counted from 1, or after some seconds."""

    rank: int
    file: int | None = None
    forward: int | None = None
    after_s: float | None = None


class Killer:
    """Counts a rank's operations in the checkpoint directory and its forward passes; kills it at a given count."""

    def __init__(self, trainer: Trainer, directory: Path, kill: Kill | None, note: Path) -> None:
        self.files: list[str] = []
        """Operations on the file system, in order."""
        self.forwards = 0
        self._trainer, self._directory, self._kill, self._note = trainer, str(directory), kill, note
        sys.addaudithook(self._see)
        task = unwrap_dense(trainer.state.model).task
        assert isinstance(task, RankingDense)
        task.register_forward_hook(lambda *_: self._forward())
        if kill is not None and kill.after_s is not None:
            timer = threading.Timer(kill.after_s, self._die)
            timer.daemon = True
            timer.start()

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _ONE_PATH:
            paths = [_resolved(arguments[0], arguments[1] if event in ("os.remove", "os.rmdir") else -1)]
        elif event in _TWO_PATHS:
            paths = [str(arguments[0]), str(arguments[1])]
        else:
            return
        if not any(path.startswith(self._directory) for path in paths):
            return
        self.files.append(" ".join([event, *(path.removeprefix(self._directory) for path in paths)]))
        if self._kill is not None and len(self.files) == self._kill.file:
            self._die()

    def _forward(self) -> None:
        self.forwards += 1
        if self._kill is not None and self.forwards == self._kill.forward:
            self._die()

    def _die(self) -> None:
        self._kill = None
        self._note.write_text(json.dumps({"iteration": self._trainer.state.iteration}))
        os.kill(os.getpid(), signal.SIGKILL)


def _resolved(path: Any, folder: int) -> str:
    return str(path) if folder < 0 else f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}"


def run(kill: Kill | None, store: str, output: str, **options: Unpack[TinyOptions]) -> dict[str, Any]:
    """Run a training as the entry scripts do. Returns what a surviving rank has counted, and its final weights."""
    torch.set_num_threads(1)
    skip_measuring_the_peak()
    run_directory.draw_curves = lambda *_: None  # takes longer than the run
    seen: dict[str, Any] = {}
    build = builder.build_trainer

    def build_and_watch(config: RunConfig, mesh: Mesh, beside_tables: builder.BesideTables | None = None) -> Trainer:
        trainer = build(config, mesh, beside_tables)
        mine = kill if kill is not None and kill.rank == mesh.rank else None
        killer = Killer(trainer, Path(str(config.trainer.ckpt_save_dir)), mine, Path(output) / "killed")
        trainer.train = _watched(trainer, killer, mesh, seen)  # type: ignore[method-assign]
        return trainer

    builder.build_trainer = build_and_watch
    code = main.run(tiny_config("ranking", store, output, **options))
    if code:
        sys.exit(code)
    return seen


def _watched(trainer: Trainer, killer: Killer, mesh: Mesh, seen: dict[str, Any]) -> Callable[[], None]:
    train, restore = trainer.train, trainer.checkpoints.restore

    def restore_and_note(state: TrainState) -> bool:
        restored = restore(state)
        seen["resumed_from"] = trainer.state.iteration
        return restored

    def train_and_note() -> None:
        trainer.checkpoints.restore = restore_and_note  # type: ignore[method-assign]
        train()
        seen.update(files=killer.files, forwards=killer.forwards, weights=digest(trainer.state, mesh))
        seen["seconds"] = json.loads((trainer.run_directory.path / "summary.json").read_text())["seconds"]

    return train_and_note


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


TIMEOUT_S = 120
SAVING = {"ckpt_save_interval": 2, "ckpt_keep_last": 2, "eval_interval": 10**6, "log_interval": 1}


def start(store: str, output: Path, fault: str = "nothing", **trainer: Any) -> subprocess.Popen[str]:
    """Start a run of one rank in a process of its own."""
    options = {"faults": {0: fault}, "iteration": 0, "store": store, "output": str(output)}
    output.mkdir()
    (output / "options").write_bytes(pickle.dumps(options | {"trainer": SAVING | trainer}))
    command = [sys.executable, "-m", run_with.__module__, str(output / "options")]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
    )


def wait_for_a_save(directory: Path, live: subprocess.Popen[str]) -> None:
    """Wait until the live run has committed another checkpoint."""
    before, begun = complete_checkpoints(directory), time.monotonic()
    while complete_checkpoints(directory) == before:
        assert live.poll() is None and time.monotonic() - begun < TIMEOUT_S
        time.sleep(0.1)


@pytest.mark.slow
def test_a_second_start_is_refused_and_does_not_harm_the_live_run(store: str, tmp_path: Path) -> None:
    live = start(store, tmp_path / "live", "slow saves", max_train_iters=10**6)
    own = {"ckpt_save_dir": tmp_path / "live" / "checkpoints", "output_dir": tmp_path / "live" / "run"}
    checkpoints = own["ckpt_save_dir"]
    wait_for_a_save(checkpoints, live)
    for option, load in zip(own, ("auto", ""), strict=True):
        trainer = SAVING | {"ckpt_load_dir": load, option: str(own[option])}
        output = str(tmp_path / option)
        (second,) = run_to_their_ends(Launch(1, TIMEOUT_S), run_with, {}, 0, store, output, trainer=trainer)
        assert second.exit_code == 2 and live.poll() is None
        assert f"TrainerArgs.{option}: the directory" in second.output and "in use by a run" in second.output
    wait_for_a_save(checkpoints, live)
    live.send_signal(signal.SIGTERM)
    text, _ = live.communicate(timeout=TIMEOUT_S)
    assert live.returncode == 0, text
    assert len(complete_checkpoints(checkpoints)) == 2
    assert not list(checkpoints.glob("set_aside*")) and not list(checkpoints.glob(".*"))
    for path in complete_checkpoints(checkpoints):
        check_files(path, "damaged")
    records = read_metrics(tmp_path / "live" / "run" / "metrics.jsonl")
    done = [record["iter"] for record in records if record["kind"] == "train"]
    assert done == list(range(1, len(done) + 1)), "another run has written to metrics.jsonl"


@pytest.mark.slow
def test_of_two_runs_that_start_together_one_trains(store: str, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    both = [start(store, tmp_path / one, max_train_iters=6, ckpt_save_dir=str(shared)) for one in "ab"]
    texts = [run.communicate(timeout=TIMEOUT_S)[0] for run in both]
    assert sorted(run.returncode for run in both) == [0, 2], texts
    for path in complete_checkpoints(shared):
        check_files(path, "damaged")

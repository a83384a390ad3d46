"""What test_kills.py runs on each rank: a run that kills itself at a given point, and a run that resumes."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch

from hstu.checkpoint.state import TrainState
from hstu.config.run_config import RunConfig
from hstu.model.ranking import RankingDense
from hstu.observe import run_directory
from hstu.parallel.ddp import unwrap_dense
from hstu.parallel.mesh import Mesh
from hstu.train import builder, main
from hstu.train.trainer import Trainer
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

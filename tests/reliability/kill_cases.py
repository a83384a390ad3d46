"""A run that kills itself at a given point, and the run that goes on: what runs on each rank for kills.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hstu.config.run_config import RunConfig
from hstu.observe.peak import PeakTflops
from hstu.parallel.dense import unwrap_dense
from hstu.parallel.mesh import Mesh
from hstu.train import builder, main
from hstu.train.trainer import Trainer
from tests.distributed.pipeline_cases import digest
from tests.train.tiny import tiny_config

_ONE_PATH = ("open", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir")
_TWO_PATHS = ("os.rename", "os.symlink")


class Witness:
    """Counts what a rank does to the checkpoints' directory, and its forwards; at a given count it kills the rank."""

    def __init__(self, trainer: Trainer, directory: Path, kill: dict[str, Any], note: Path) -> None:
        self.files: list[str] = []
        """Operations on the file system, in order."""
        self.forwards = 0
        self._trainer, self._directory, self._kill, self._note = trainer, str(directory), kill, note
        sys.addaudithook(self._see)
        unwrap_dense(trainer.state.model).task.register_forward_hook(lambda *_: self._forward())
        if "after_s" in kill:
            timer = threading.Timer(kill["after_s"], self._die, ("a moment",))
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
        if len(self.files) == self._kill.get("file"):
            self._die(self.files[-1])

    def _forward(self) -> None:
        self.forwards += 1
        if self.forwards == self._kill.get("forward"):
            self._die("forward")

    def _die(self, what: str) -> None:
        progress, background = self._trainer.mesh.progress, self._trainer.checkpoints._background
        in_flight = background is not None and not all(work.done() for work in background._work)
        told = {
            "what": what,
            "stage": progress.stage,
            "in_flight": in_flight,
            "iteration": self._trainer.state.iteration,
        }
        self._kill = {}
        self._note.write_text(json.dumps(told))
        os.kill(os.getpid(), signal.SIGKILL)


def _resolved(path: Any, folder: int) -> str:
    return str(path) if folder < 0 else f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}"


def run(kill: dict[str, Any], store: str, output: str, **options: Any) -> dict[str, Any]:
    """A whole run as the entry scripts start it. ``kill``: rank, and at which "file" operation, "forward" or "after_s".

    Returns what a rank that lives on has seen and made.
    """
    torch.set_num_threads(1)
    builder.peak_tflops = lambda *_: PeakTflops(1.0, "assumed")  # type: ignore[assignment]  # takes longer than the run
    seen: dict[str, Any] = {}
    build = builder.build_trainer

    def build_and_watch(config: RunConfig, mesh: Mesh) -> Trainer:
        trainer = build(config, mesh)
        mine = kill if kill.get("rank") == mesh.rank else {}
        witness = Witness(trainer, Path(config.trainer.ckpt_save_dir), mine, Path(output) / "killed")
        trainer.train = _watched(trainer, witness, mesh, seen)  # type: ignore[method-assign]
        return trainer

    builder.build_trainer = build_and_watch
    code = main.run(tiny_config("ranking", store, output, **options))
    if code:
        sys.exit(code)
    return seen


def _watched(trainer: Trainer, witness: Witness, mesh: Mesh, seen: dict[str, Any]) -> Callable[[], None]:
    train, restore = trainer.train, trainer.checkpoints.restore

    def restore_and_note(*arguments: Any) -> bool:
        restored = restore(*arguments)
        seen["resumed_from"] = trainer.state.iteration
        return restored

    def train_and_note() -> None:
        trainer.checkpoints.restore = restore_and_note  # type: ignore[method-assign]
        train()
        seen.update(files=witness.files, forwards=witness.forwards, weights=digest(trainer.state, mesh))
        seen["seconds"] = json.loads((trainer.run_directory.path / "summary.json").read_text())["seconds"]

    return train_and_note

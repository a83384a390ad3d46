"""What runs on each rank in the tests of this directory."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter

from hstu.checkpoint import save as saving
from hstu.checkpoint.background import Background
from hstu.checkpoint.directory import complete
from hstu.checkpoint.load import load
from hstu.checkpoint.manifest import DamagedCheckpoint
from hstu.checkpoint.store import CheckpointStore
from hstu.config.run_config import RunConfig
from hstu.data.store import SequenceStore
from hstu.observe.peak import PeakTflops
from hstu.parallel import mesh as mesh_module
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh
from hstu.train import builder, main
from hstu.train.trainer import Trainer
from tests.distributed.checkpoint_cases import _new_state, _train
from tests.distributed.pipeline_cases import digest
from tests.train.tiny import tables_with_dynamic, tiny_config

BEST = 5
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def flipped_bytes(directory: str, number: int, seed: int) -> list[dict[str, Any]]:
    """Two checkpoints; a byte of the newer is changed, ``number`` times: what naming it and what "auto" then do."""
    mesh = mesh_module.start(timeout_s=60)
    state, store = _new_state(mesh, {"optimizer": "adam"}), CheckpointStore(directory, "auto", mesh)
    digests = {}
    for steps in (2, 2):
        _train(state, mesh, steps)
        store.save(state)
        digests[state.iteration] = digest(state, mesh)
    newer = Path(directory) / f"iteration_{state.iteration:08d}"
    files = sorted(path for path in newer.rglob("*") if path.is_file())
    rng, outcomes = random.Random(seed), []
    warnings = _Collected()
    logging.getLogger("hstu.checkpoint").addHandler(warnings)
    for index in range(number):
        # every file alike often, and every byte: most bytes are tensors
        weights = [1 if index % 2 else path.stat().st_size for path in files]
        path = rng.choices(files, weights)[0]
        place, difference = rng.randrange(path.stat().st_size), rng.randrange(1, 256)
        _change(path, place, difference, mesh)
        try:
            load(newer, state, mesh)
            refusal = "loaded without a word"
        except DamagedCheckpoint as error:
            refusal = str(error)
        warnings.messages.clear()
        restored = store.restore(state)
        outcomes.append(
            {
                "file": str(path),
                "refusal": refusal,
                "auto": state.iteration if restored else None,
                "warnings": list(warnings.messages),
                "as_saved": digest(state, mesh) == digests.get(state.iteration),
            }
        )
        _change(path, place, difference, mesh)  # back again
    outcomes.append({"in_the_end": store.restore(state) and state.iteration})
    mesh_module.finish()
    return outcomes


class _Collected(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _change(path: Path, place: int, difference: int, mesh: Mesh) -> None:
    gather_objects(None, mesh.world_group)  # all have read what they wanted
    if mesh.is_main:
        content = bytearray(path.read_bytes())
        content[place] ^= difference
        path.write_bytes(content)
    gather_objects(None, mesh.world_group)


def many_saves(directory: str, saves: int, keep: int, background: bool) -> dict[str, Any]:
    """Save again and again while a thread looks what is there: how many commits it saw, memory."""
    mesh = mesh_module.start(timeout_s=60)
    torch.set_num_threads(1)
    state = _new_state(mesh, {"optimizer": "adam"})
    store = CheckpointStore(directory, "", mesh, keep, Background(mesh, 60) if background else None)
    store.claim()
    seen: list[int] = []
    memory: list[int] = []
    looking = threading.Event()

    def look() -> None:
        while not looking.wait(0.002):
            if state.iteration > keep + 2:
                seen.append(len(complete(Path(directory))))

    watcher = threading.Thread(target=look)
    watcher.start()
    begun = time.monotonic()
    for _ in range(saves):
        _train(state, mesh, 1)
        store.save(state)
        if state.iteration == BEST:
            store.keep(BEST)
        store.poll()
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES)
    store.wait()
    seconds = time.monotonic() - begun
    looking.set()
    watcher.join()
    mesh_module.finish()
    names = sorted(path.name for path in Path(directory).iterdir())
    return {"seen": [min(seen), max(seen), len(seen)], "memory": memory, "names": names, "seconds": seconds}


def run_with(
    deeds: dict[str, str], iteration: int, store: str, output: str, rows: int | None = None, **options: Any
) -> dict[str, Any]:
    """A whole run, as the entry scripts start it. ``deeds``: rank → what befalls it in or before ``iteration``.

    ``rows``: the items have a dynamic table of that capacity.
    Returns what the rank's run was like; a rank whose run fails ends with its exit code.
    """
    torch.set_num_threads(1)
    builder.peak_tflops = lambda *_: PeakTflops(1.0, "assumed")  # type: ignore[assignment]  # takes longer than the run
    seen: dict[str, Any] = {}
    build = builder.build_trainer

    def build_and_sabotage(config: RunConfig, mesh: Mesh) -> Trainer:
        trainer = build(config, mesh)
        if str(mesh.rank) in deeds:
            DEEDS[deeds[str(mesh.rank)]](trainer, iteration, Path(output))
        _note(trainer, seen)
        return trainer

    builder.build_trainer = build_and_sabotage
    if rows is not None:
        options["tables"] = tables_with_dynamic(SequenceStore.open(store), rows)
    code = main.run(tiny_config("ranking", store, output, **options))
    if code:
        sys.exit(code)
    return seen


def _note(trainer: Trainer, seen: dict[str, Any]) -> None:
    save, train = trainer.checkpoints.save, trainer.train
    stalls: list[float] = seen.setdefault("stalls_s", [])

    def save_and_note(state: Any) -> None:
        begun = time.monotonic()
        save(state)
        stalls.append(time.monotonic() - begun)

    def train_and_note() -> None:
        trainer.checkpoints.save = save_and_note  # type: ignore[method-assign]
        train()
        seen["marks"] = trainer.mesh.progress.marks
        seen["iterations"] = trainer.state.iteration

    trainer.train = train_and_note  # type: ignore[method-assign]


def note_time(output: Path) -> None:
    """When it happened; seconds since the epoch."""
    (output / "failed_at_1").write_text(str(time.time()))


def in_saving(deed: Callable[[Path], None]) -> Callable[[Trainer, int, Path], None]:
    """Do it instead of writing this rank's tensors of a given iteration's checkpoint."""

    def sabotage(_trainer: Trainer, iteration: int, output: Path) -> None:
        write = FileSystemWriter.write_data

        def write_data(self: FileSystemWriter, *plan: Any) -> Any:
            if f"iteration_{iteration:08d}" in str(self.path):
                deed(output)
            return write(self, *plan)

        FileSystemWriter.write_data = write_data  # type: ignore[method-assign]

    return sabotage


def slowly(trainer: Trainer, _iteration: int, output: Path) -> None:
    """Every checkpoint takes a while to be written; how many at once, and how late, goes into a file."""
    write, at_once, behind = saving._write_tensors, [0], [0]

    def write_tensors(root: Path, contents: saving.Contents, mesh: Mesh) -> None:
        at_once.append(len(list(root.parent.glob(".writing_*"))))
        time.sleep(0.5)
        behind.append(trainer.state.iteration - contents.iteration)
        write(root, contents, mesh)
        (output / "at_once").write_text(json.dumps([max(at_once), max(behind)]))

    saving._write_tensors = write_tensors


def refuse(output: Path) -> None:
    note_time(output)
    raise OSError(28, "No space left on device")


def in_step(deed: Callable[[Trainer, Path], None]) -> Callable[[Trainer, int, Path], None]:
    """Do it before the step of an iteration is taken."""

    def sabotage(trainer: Trainer, iteration: int, output: Path) -> None:
        step = trainer._step

        def step_and_do(batches: Any) -> None:
            if trainer.state.iteration + 1 == iteration:
                deed(trainer, output)
            step(batches)

        trainer._step = step_and_do  # type: ignore[method-assign]

    return sabotage


def terminate(_trainer: Trainer, output: Path) -> None:
    """As a scheduler that wants the machine back."""
    note_time(output)
    os.kill(os.getpid(), signal.SIGTERM)


def lose_a_worker(_trainer: Trainer, _output: Path) -> None:
    """As the kernel does where memory has run out. Workers are children of the server that they are forked from."""
    for child in _children(os.getpid()):
        for worker in _children(child):
            os.kill(worker, signal.SIGKILL)


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def fill_disk_of_run(trainer: Trainer, _output: Path) -> None:
    """Nothing more fits on the disk that the run's directory is on."""
    with (trainer.run_directory.path / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return


DEEDS: dict[str, Callable[[Trainer, int, Path], None]] = {
    "nothing": lambda *_: None,
    "slow": slowly,
    "refused": in_saving(refuse),
    "killed": in_saving(lambda _: os.kill(os.getpid(), signal.SIGKILL)),
    "SIGTERM": in_step(terminate),
    "worker lost": in_step(lose_a_worker),
    "disk of the run full": in_step(fill_disk_of_run),
}


def synchronised(directory: str) -> list[tuple[float, str, str]]:
    """Save a checkpoint: the fsyncs and renames of this rank, with the time (the same clock for all ranks)."""
    mesh = mesh_module.start(timeout_s=60)
    state, store = _new_state(mesh, {}), CheckpointStore(directory, "", mesh)
    deeds: list[tuple[float, str, str]] = []
    fsync = os.fsync

    def note_fsync(handle: int) -> None:
        fsync(handle)
        deeds.append((time.monotonic(), "fsync", os.readlink(f"/proc/self/fd/{handle}")))

    def note_rename(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            deeds.append((time.monotonic(), "rename", str(arguments[0])))

    os.fsync = note_fsync  # type: ignore[assignment]
    sys.addaudithook(note_rename)
    store.claim()
    store.save(state)
    mesh_module.finish()
    return deeds

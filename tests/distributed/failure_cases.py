"""Whole runs in which some ranks have a fault, for the tests of failures; also as a script, for torchrun."""

import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

import torch
from torch.distributed.checkpoint import FileSystemWriter

from hstu.base.errors import DataError
from hstu.checkpoint import directory
from hstu.checkpoint import save as saving
from hstu.config.run_config import RunConfig
from hstu.data.batches.batch import HSTUBatch
from hstu.data.sampling.sampler import SamplerPosition
from hstu.data.sampling.splits import Split
from hstu.data.store.sequence_store import SequenceStore
from hstu.model.stack import ModelOutput
from hstu.observe import run_directory, watchdog
from hstu.parallel.mesh import Mesh
from hstu.train import builder, main
from hstu.train.trainer import Trainer
from tests.train.tiny import TinyOptions, in_forward, skip_measuring_the_peak, tables_with_dynamic, tiny_config


def run_with(
    faults: dict[int, str],
    iteration: int,
    store: str,
    output: str,
    rows: int | None = None,
    **options: Unpack[TinyOptions],
) -> dict[str, Any]:
    """A whole run, as the entry scripts start it. ``faults``: rank → its fault, one of FAULTS, in ``iteration``.

    ``rows``: capacity of a dynamic table of the items. None: their table is static. Returns the times of the rank's
    saves, and its marks and iterations. A rank whose run fails exits with the exit code of the run. A rank writes the
    time of its fault, in seconds since 1970, to ``output``/failed_at_<rank>.
    """
    torch.set_num_threads(1)
    skip_measuring_the_peak()
    run_directory.draw_curves = lambda *_: None  # takes longer than the run
    seen: dict[str, Any] = {}
    build = builder.build_trainer

    def build_with_faults(config: RunConfig, mesh: Mesh, *rest: Any, **options: Any) -> Trainer:
        trainer = build(config, mesh, *rest, **options)
        if mesh.rank in faults:
            FAULTS[faults[mesh.rank]](trainer, iteration, Path(output) / f"failed_at_{mesh.rank}")
        _note(trainer, seen)
        return trainer

    builder.build_trainer = build_with_faults
    if rows is not None:
        options["tables"] = tables_with_dynamic(SequenceStore.open(store), rows)
    code = main.run(tiny_config("ranking", store, output, **options))
    if code:
        sys.exit(code)
    return seen


def run_apart(iteration: int, store: str, output: str, **options: Unpack[TinyOptions]) -> dict[str, Any]:
    """A run whose rank 1 has a disk of its own from ``iteration``, as on another host. 0: from the start."""
    directory._VISIBLE_S = 1.0
    options["trainer"] = {**options.get("trainer", {}), "ckpt_save_dir": "checkpoints"}
    (Path(output) / "other_disk").mkdir(exist_ok=True)
    os.chdir(f"{output}/other_disk" if iteration == 0 and os.environ["RANK"] == "1" else output)
    return run_with({1: "another disk"}, iteration, store, output, **options)


def _note(trainer: Trainer, seen: dict[str, Any]) -> None:
    save, train = trainer.checkpoints.save, trainer.train
    stalls: list[float] = seen.setdefault("stalls_s", [])

    def save_and_note(state: Any, **options: bool) -> None:
        begun = time.monotonic()
        save(state, **options)
        stalls.append(time.monotonic() - begun)

    def train_and_note() -> None:
        trainer.checkpoints.save = save_and_note  # type: ignore[method-assign]
        train()
        seen["marks"] = trainer.mesh.heartbeat.marks
        seen["iterations"] = trainer.state.iteration

    trainer.train = train_and_note  # type: ignore[method-assign]


def in_loading(deed: Callable[[], None]) -> Callable[[Trainer, int, Path], None]:
    """Do it instead of loading the batch of an iteration, counted from the first of the process."""

    def sabotage(trainer: Trainer, iteration: int, failed_at: Path) -> None:
        load = trainer.source.train_batches

        def batches(position: SamplerPosition) -> Iterator[HSTUBatch]:
            for number, batch in enumerate(load(position), 1):
                if number == iteration and not failed_at.exists():  # once, also if the run is started again
                    failed_at.write_text(str(time.time()))
                    deed()
                yield batch

        trainer.source.train_batches = batches  # type: ignore[method-assign]

    return sabotage


def over_an_evaluation(trainer: Trainer, iteration: int, failed_at: Path) -> None:
    """SIGTERM over the first of so many slow batches that the evaluation would take minutes."""
    load = trainer.source.eval_batches

    def batches(split: Split) -> Iterator[HSTUBatch]:
        (batch,) = islice(load(split), 1)
        for _ in range(1000):
            if trainer.state.iteration == iteration and not failed_at.exists():
                failed_at.write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
            yield batch

    trainer.source.eval_batches = batches  # type: ignore[method-assign]


def without_number(trainer: Trainer, iteration: int, failed_at: Path) -> None:
    """The loss of an iteration is no number."""

    def lose(output: ModelOutput) -> None:
        failed_at.write_text(str(time.time()))
        output.loss_sum = output.loss_sum * float("nan")

    in_forward(trainer, iteration, lose)


def sleep_through_sigterm() -> None:
    """As a rank that waits for its GPU: nothing it calls fails, and the signal's handler changes nothing."""
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    time.sleep(1000)


def in_saving(fault: Callable[[Path], None]) -> Callable[[Trainer, int, Path], None]:
    """Cause the fault when this rank writes its tensors of the checkpoint of an iteration."""

    def install(_trainer: Trainer, iteration: int, failed_at: Path) -> None:
        write = FileSystemWriter.write_data

        def write_data(self: Any, *plan: Any, **options: Any) -> Any:
            if f"iteration_{iteration:08d}" in str(self.path):
                fault(failed_at)
            return write(self, *plan, **options)

        FileSystemWriter.write_data = write_data  # type: ignore[method-assign]

    return install


def slowly(trainer: Trainer, _iteration: int, failed_at: Path) -> None:
    """Delay the writing of each checkpoint. A file gets how many were written at once, and how many steps late."""
    write, at_once, behind = saving._write_tensors, [0], [0]

    def write_tensors(root: Path, snapshot: saving.Snapshot, mesh: Mesh) -> None:
        at_once.append(len(list(root.parent.glob(".writing_*"))))
        time.sleep(1.0)  # longer than several steps, on a busy machine too
        behind.append(trainer.state.iteration - snapshot.iteration)
        write(root, snapshot, mesh)
        failed_at.with_name("at_once").write_text(json.dumps([max(at_once), max(behind)]))

    saving._write_tensors = write_tensors


def no_space(failed_at: Path) -> None:
    failed_at.write_text(str(time.time()))
    raise OSError(28, "No space left on device")


def in_step(fault: Callable[[Trainer, Path], None]) -> Callable[[Trainer, int, Path], None]:
    """Cause the fault before the training step of an iteration."""

    def install(trainer: Trainer, iteration: int, failed_at: Path) -> None:
        step = trainer._train_step

        def step_with_fault(batches: Any) -> None:
            if trainer.state.iteration + 1 == iteration:
                fault(trainer, failed_at)
            step(batches)

        trainer._train_step = step_with_fault  # type: ignore[method-assign]

    return install


def terminate(_trainer: Trainer, failed_at: Path) -> None:
    """Send SIGTERM, as a scheduler does that takes the machine back."""
    failed_at.write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_all(_trainer: Trainer, failed_at: Path) -> None:
    """Send SIGTERM to this rank and its data workers from another process, as torchrun and schedulers do."""
    failed_at.write_text(str(time.time()))
    subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"], start_new_session=True)


def interrupt_all(_trainer: Trainer, failed_at: Path) -> None:
    """Send SIGINT to this rank and its data workers, as a terminal does on Ctrl-C."""
    failed_at.write_text(str(time.time()))
    os.killpg(0, signal.SIGINT)


def interrupt_twice(trainer: Trainer, failed_at: Path) -> None:
    interrupt_all(trainer, failed_at)
    interrupt_all(trainer, failed_at)


def terminate_and_end_slowly(trainer: Trainer, iteration: int, failed_at: Path) -> None:
    """Send SIGTERM to a rank whose trackers take longer to close than its watchdog waits, and its curves for ever."""
    watchdog._SILENCE_ON_SIGTERM_S = run_directory._DRAWING_S = 1.0
    close = trainer.run_directory.close

    def close_slowly() -> None:
        time.sleep(4)
        close()

    trainer.run_directory.close = close_slowly  # type: ignore[method-assign]
    run_directory.draw_curves = lambda *_: time.sleep(1000)
    in_step(terminate)(trainer, iteration, failed_at)


def lose_a_worker_soon(_trainer: Trainer, _failed_at: Path) -> None:
    """Kill the data workers, as the kernel does if memory runs out, in whatever line the main thread then executes."""

    def kill() -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)

    threading.Timer(0.02, kill).start()


def fill_disk_of_run(trainer: Trainer, _failed_at: Path) -> None:
    """Fill the disk of the run's directory."""
    with (trainer.run_directory.path / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return


def refuse(error: Exception) -> None:
    raise error


FAULTS: dict[str, Callable[[Trainer, int, Path], None]] = {
    "nothing": lambda *_: None,
    "told to stop over an evaluation": over_an_evaluation,
    "killed": in_loading(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "frozen": in_loading(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "asleep over a batch": in_loading(lambda: time.sleep(1000)),
    "asleep through SIGTERM": in_loading(sleep_through_sigterm),
    "bad data": in_loading(lambda: refuse(DataError("row 7 is torn"))),
    "no number": without_number,
    "slow saves": slowly,
    "refused": in_saving(no_space),
    "killed while saving": in_saving(lambda _: os.kill(os.getpid(), signal.SIGKILL)),
    "SIGTERM": in_step(terminate),
    "SIGTERM to all processes": in_step(terminate_all),
    "SIGTERM and a slow end": terminate_and_end_slowly,
    "another disk": in_step(lambda _trainer, failed_at: os.chdir(failed_at.parent / "other_disk")),
    "Ctrl-C": in_step(interrupt_all),
    "Ctrl-C twice": in_step(interrupt_twice),
    "worker lost soon": in_step(lose_a_worker_soon),
    "disk of the run full": in_step(fill_disk_of_run),
}
if __name__ == "__main__":
    logging.captureWarnings(True)
    run_with(**pickle.loads(Path(sys.argv[1]).read_bytes()))

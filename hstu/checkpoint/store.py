"""The checkpoints of a run: saving, also in the background, restoring, retention, and the latest and the best one.

A checkpoint is a directory ``iteration_<n>`` with ``tensors/`` (torch.distributed.checkpoint; each rank writes its
shards), ``progress.json``, ``operative.gin``, ``rng_rank<r>.pt``, files of dynamic tables and ``manifest.json``. It is
written under another name and renamed when every byte is on disk, and it is never written again. Then ``latest`` is
pointed to it, which is the commit.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hstu.checkpoint import directory as folder
from hstu.checkpoint.directory import BEST, LATEST, MANIFEST, DamagedCheckpoint, collective_io
from hstu.checkpoint.load import load
from hstu.checkpoint.matching import LoadOptions
from hstu.checkpoint.save import HostCopies, Snapshot, write
from hstu.checkpoint.state import TrainState
from hstu.config.errors import ConfigError, DataError
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Heartbeat, Mesh

log = logging.getLogger(__name__)

AUTO = "auto"
_POLL_S = 0.5


class CheckpointStore:
    """The checkpoints of one run. All methods are collective.

    ``save_dir``, ``load_dir``: TrainerArgs.ckpt_save_dir and ckpt_load_dir. ``keep_last``: how many checkpoints to
    keep besides the best one; None: all. ``background``: writes checkpoints while training goes on; None: ``save``
    returns when everything is written.
    """

    def __init__(
        self,
        save_dir: str | Path,
        load_dir: str,
        mesh: Mesh,
        keep_last: int | None = None,
        background: BackgroundWriter | None = None,
        load_options: LoadOptions | None = None,
    ) -> None:
        self.save_dir = Path(save_dir)
        self.load_dir = load_dir
        self.mesh = mesh
        self.newest_iteration: int | None = None
        """Iteration of the last checkpoint in ``save_dir`` that this run has saved or was restored from."""
        self._restored: Path | None = None
        self._keep_last = keep_last
        self._background = background
        self._load_options = load_options or LoadOptions()
        self._copies: HostCopies = {}

    def claim(self) -> None:
        """Check, before training, that this run can save without touching another run's checkpoints.

        Call it after ``restore``. Raises ConfigError.
        """
        collective_io(lambda: self._claim() if self.mesh.is_main else None, self.mesh)

    def save(self, state: TrainState) -> None:
        """Save a checkpoint of ``state``, which may change when this returns.

        With a background writer, only the previous checkpoint is complete when this returns; ``poll`` and ``wait``
        raise the errors of this one. Raises CheckpointFailure if the file system refuses.
        """
        self.wait()
        snapshot = Snapshot.of(state, self.mesh, None if self._background is None else self._copies)
        self._run(lambda mesh: self._write(snapshot, mesh))
        self.newest_iteration = state.iteration

    def mark_best(self, iteration: int) -> None:
        """Point ``best`` to a saved checkpoint, which is then kept until another one is the best."""
        path = folder.checkpoint_path(self.save_dir, iteration)

        def link(mesh: Mesh) -> None:
            collective_io(lambda: folder.set_link(self.save_dir, BEST, path) if mesh.is_main else None, mesh)

        self._run(link)

    def _run(self, function: Callable[[Mesh], None]) -> None:
        """Call ``function`` now, or let the background writer call it."""
        if self._background is None:
            function(self.mesh)
        else:
            self._background.start(function)

    @property
    def is_saving(self) -> bool:
        """Whether a save in the background has not been reported by ``poll`` or ``wait``; the same on all ranks."""
        return self._background is not None and self._background.is_working

    def poll(self) -> None:
        """Raise the error of a failed save in the background. Call it in every step."""
        if self._background is not None:
            self._background.poll()

    def wait(self) -> None:
        """Return when everything is written, or raise the error of a failed save."""
        if self._background is not None:
            self._background.wait()

    def close(self) -> None:
        """Wait for a save in the background in a run that has already failed. An error is only logged."""
        try:
            self.wait()
        except Exception as error:
            log.error("a checkpoint that was being written is lost: %s", error)

    def restore(self, state: TrainState) -> bool:
        """Load the checkpoint that the configuration names and return True, or return False if it names none.

        "auto" falls back to an older checkpoint if the newest is damaged. Raises DataError if none is intact.
        """
        found = collective_io(lambda: _candidates(self.load_dir, str(self.save_dir)), self.mesh)
        candidates = gather_objects(found, self.mesh.world_group)[0]
        for path in candidates:
            try:
                load(path, state, self.mesh, self._load_options)
            except DamagedCheckpoint as error:
                if self.load_dir != AUTO:
                    raise
                log.warning("%s Trying the previous one.", error)
                continue
            if self._load_options.optimizer:
                self._restored = path
                if self._is_own(path):
                    self.newest_iteration = state.iteration
                log.info("resuming from %s", path)
            else:
                log.info("starting from the weights of %s", path)
            return True
        if candidates:
            raise DataError(
                f"every checkpoint in {self.save_dir} is damaged: {', '.join(path.name for path in candidates)}; the "
                'log says how. TrainerArgs.ckpt_load_dir = "" and another ckpt_save_dir train from the start.'
            )
        return False

    def _is_own(self, path: Path) -> bool:
        """Return whether a checkpoint lies where this run saves."""
        return path.resolve().parent == self.save_dir.resolve()

    def _write(self, snapshot: Snapshot, mesh: Mesh) -> None:
        path = write(self.save_dir, snapshot, mesh)
        collective_io(lambda: self._publish(path) if mesh.is_main else None, mesh)

    def _publish(self, path: Path) -> None:
        folder.set_link(self.save_dir, LATEST, path)
        self._delete_older(folder.iteration_of(path))

    def _delete_older(self, iteration: int | None) -> None:
        if self._keep_last is not None and iteration is not None:
            folder.delete_older(self.save_dir, iteration, self._keep_last)

    def _claim(self) -> None:
        try:
            folder.begin(folder.checkpoint_path(self.save_dir, 0)).rmdir()
        except OSError as error:
            raise ConfigError(
                f"TrainerArgs.ckpt_save_dir: the directory '{self.save_dir}' cannot be written: "
                f"{error.strerror or error}. Free space or permissions there, or give another directory."
            ) from error
        others = folder.complete_checkpoints(self.save_dir)
        if others and (self._restored is None or not self._is_own(self._restored)):
            raise ConfigError(
                f"TrainerArgs.ckpt_save_dir: '{self.save_dir}' holds the checkpoints of another run "
                f"({others[0].name}{', …' if len(others) > 1 else ''}), which are never overwritten. Continue from "
                'them (TrainerArgs.ckpt_load_dir = "auto"), give another directory, or delete them.'
            )
        self._delete_older(self.newest_iteration)


def find_checkpoint(load_dir: str, save_dir: str) -> Path | None:
    """Return the checkpoint that ``load_dir`` means: itself, the latest in it, or ("auto") the latest in ``save_dir``.

    Returns None where there is none to load. Raises DataError if a named directory has no complete checkpoint.
    """
    return next(iter(_candidates(load_dir, save_dir)), None)


def _candidates(load_dir: str, save_dir: str) -> list[Path]:
    """Return the same checkpoint, followed by those to try if it is damaged."""
    if not load_dir:
        return []
    if load_dir == AUTO:
        return folder.restore_candidates(Path(save_dir))
    path = Path(load_dir)
    found = [path] if (path / MANIFEST).is_file() else folder.restore_candidates(path)[:1]
    if not found:
        raise DataError(
            f'no complete checkpoint in {path} (TrainerArgs.ckpt_load_dir). Give a directory "iteration_<n>" that '
            f'holds a {MANIFEST}, the directory above such directories, "auto" or "".'
        )
    return found


class BackgroundWriter:
    """Runs one function after another in a thread, in the same order on all ranks. Create it collectively.

    The functions get a mesh of their own. Its collectives use a gloo group that only these threads use, so that they
    cannot be mixed up with those of training. Its heartbeat is separate, because the watchdog
    compares that of the main thread.

    ``timeout_s``: how long these collectives wait for a rank.
    """

    def __init__(self, mesh: Mesh, timeout_s: float) -> None:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._mesh = mesh
        self._own_mesh = dataclasses.replace(mesh, world_group=group, heartbeat=Heartbeat())
        # Without this the thread would create a context on the host's first GPU, whichever GPU the copies come from.
        device = (torch.cuda.set_device, (mesh.device,)) if mesh.device.type == "cuda" else (None, ())
        self._thread = ThreadPoolExecutor(1, "checkpoint", *device)
        self._work: list[Future[None]] = []

    def start(self, function: Callable[[Mesh], None]) -> None:
        """Call ``function`` in the thread after all earlier ones."""
        self._work.append(self._thread.submit(function, self._own_mesh))

    @property
    def is_working(self) -> bool:
        """Whether ``poll`` or ``wait`` have not reported all functions; the same on all ranks."""
        return bool(self._work)

    def poll(self) -> None:
        """Raise the error of a function that has ended on all ranks: on all ranks in the same step.

        Collective, but only where a function is running.
        """
        if not self._work:
            return
        ended = torch.tensor([int(all(work.done() for work in self._work))])
        if self._mesh.world_size > 1:
            dist.all_reduce(ended, op=dist.ReduceOp.MIN, group=self._mesh.world_group)
        if ended.item():
            self._raise_errors()

    def wait(self) -> None:
        """Wait for all functions and raise the first error. Collective."""
        before = -1
        while wait(self._work, _POLL_S).not_done:
            marks = self._own_mesh.heartbeat.marks
            if marks != before:  # the thread makes progress, so this rank is not stuck
                self._mesh.heartbeat.beat()
            before = marks
        self._raise_errors()

    def _raise_errors(self) -> None:
        work, self._work = self._work, []
        for each in work:
            each.result()

"""The checkpoints of a run: saving, also in the background, restoring, retention, the latest and the best.

A checkpoint is a directory ``iteration_<n>`` with ``tensors/`` (torch.distributed.checkpoint; each rank writes its
shards), ``progress.json``, ``operative.gin``, ``rng_rank<r>.pt``, files of dynamic tables and ``manifest.json``. It is
written under a temporary name and renamed when every byte is on disk. Pointing ``latest`` to it commits it.
"""

import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hstu.base.errors import ConfigError, DataError
from hstu.base.files import DirectoryLock
from hstu.checkpoint import directory as folder
from hstu.checkpoint.directory import BEST, LATEST, DamagedCheckpoint, collective_io
from hstu.checkpoint.find import AUTO, belongs, candidates
from hstu.checkpoint.load import check_all_files, load
from hstu.checkpoint.matching import LoadOptions
from hstu.checkpoint.mirror import Mirror
from hstu.checkpoint.save import HostCopies, Snapshot, write
from hstu.checkpoint.state import TrainState
from hstu.parallel.collectives import gather_objects, on_rank_0
from hstu.parallel.mesh import Heartbeat, Mesh

log = logging.getLogger(__name__)

_POLL_S = 0.5


@dataclass(eq=False)
class CheckpointStore:
    """The checkpoints of one run. All methods are collective.

    ``load_dir``: TrainerArgs.ckpt_load_dir. ``keep_last``: checkpoints to keep besides the best; None: all.
    ``url``: where everything that ``save_dir`` has is uploaded.
    ``background_timeout_s``: write checkpoints during training, in a thread whose collectives have this timeout. None:
    ``save`` returns when everything is written.
    """

    save_dir: Path
    load_dir: str
    mesh: Mesh
    keep_last: int | None = None
    background_timeout_s: float | None = None
    load_options: LoadOptions = LoadOptions()
    url: str | None = None

    def __post_init__(self) -> None:
        self.newest_iteration: int | None = None
        """Iteration of the last checkpoint in ``save_dir`` that this run has saved or loaded."""
        self._lock: DirectoryLock | None = None
        self._is_new = False
        self._found: Path | None = None
        mesh = self.mesh
        self._mirror = Mirror(self.url, self.save_dir, self.keep_last) if self.url and mesh.is_main else None
        self._work: list[Future[None]] = []
        self._thread: ThreadPoolExecutor | None = None
        if self.background_timeout_s is not None:
            # Its gloo group separates its collectives from training. Its heartbeat is separate because the watchdog
            # compares the main threads' heartbeats.
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.background_timeout_s))
            self._thread_mesh = dataclasses.replace(mesh, world_group=group, heartbeat=Heartbeat())
            # Without this the thread would create a context on the host's first GPU, regardless of this rank's GPU.
            device = (torch.cuda.set_device, (mesh.device,)) if mesh.device.type == "cuda" else (None, ())
            self._thread = ThreadPoolExecutor(1, "checkpoint", *device)
        self._copies: HostCopies | None = None if self._thread is None else {}

    def claim(self) -> None:
        """Lock ``save_dir`` until ``close`` and remove leftovers of killed runs, before the run changes anything else.
        Raises ConfigError if another run saves or has saved there, or if a rank cannot write or see the directory."""
        probe = collective_io(self._claim, self.mesh, on_rank_0)
        seen = gather_objects(folder.becomes_visible(probe), self.mesh.world_group)
        if self.mesh.is_main:
            probe.rmdir()
        if not all(seen):
            self.close()
            raise ConfigError(
                f"TrainerArgs.ckpt_save_dir: rank {seen.index(False)} cannot see what rank 0 writes to "
                f"'{self.save_dir}'. Every rank saves its part there: give a directory that all hosts share."
            )

    def continues(self, run_directory: Path) -> bool:
        """Return whether ``restore`` continues the run that wrote to ``run_directory``."""
        return self.load_options.optimizer and any(belongs(path, run_directory) for path in self._candidates())

    def save(self, state: TrainState) -> None:
        """Save a checkpoint of ``state``, which may change afterwards. Raises CheckpointFailure. In the background,
        ``poll`` and ``wait`` raise it."""
        self.wait()
        snapshot = Snapshot.of(state, self.mesh, self._copies)
        self._run(lambda mesh: self._write(snapshot, mesh))
        self.newest_iteration = state.iteration

    def mark_best(self, iteration: int) -> None:
        """Point ``best`` to a saved checkpoint and keep it until another one is the best."""
        path = folder.checkpoint_path(self.save_dir, iteration)
        self._run(lambda mesh: collective_io(lambda: self._link(BEST, path), mesh, on_rank_0))

    def _run(self, function: Callable[[Mesh], None]) -> None:
        """Call ``function``, in the background after all earlier ones."""
        if self._thread is None:
            function(self.mesh)
        else:
            self._work.append(self._thread.submit(function, self._thread_mesh))

    @property
    def is_saving(self) -> bool:
        """Whether ``poll`` or ``wait`` have yet to report a background save; the same on all ranks."""
        return bool(self._work)

    def poll(self) -> None:
        """Raise the error of a failed background save, once all have ended on all ranks. Call it in every step."""
        if not self._work:
            return
        ended = torch.tensor([int(all(work.done() for work in self._work))])
        if self.mesh.world_size > 1:
            dist.all_reduce(ended, op=dist.ReduceOp.MIN, group=self.mesh.world_group)
        if ended.item():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written, and raise the first error of a failed save."""
        before = -1
        while wait(self._work, _POLL_S).not_done:
            marks = self._thread_mesh.heartbeat.marks
            if marks != before:  # the thread makes progress, so this rank is alive
                self.mesh.heartbeat.beat()
            before = marks
        work, self._work = self._work, []
        for each in work:
            each.result()

    def finish_uploads(self) -> None:
        """Wait until all that was saved is at the URL. Raises CheckpointFailure if the last could not go there."""
        while not on_rank_0(lambda: self._mirror is None or self._mirror.is_done(5.0), self.mesh.world_group):
            self.mesh.heartbeat.beat()
        mirror, self._mirror = self._mirror, None
        collective_io(mirror.close if mirror else lambda: None, self.mesh, on_rank_0)

    def close(self) -> None:
        """Wait for a background save and for uploads, log their errors, and unlock ``save_dir``."""
        try:
            self.wait()
            if self._mirror is not None:
                self._mirror.close()
        except Exception as error:
            log.error("a checkpoint that was being written is lost: %s", error)
        if self._lock is not None:
            self._lock.release()
            self._lock = None
            if self._is_new:
                with contextlib.suppress(OSError):  # the directory is not empty
                    self.save_dir.rmdir()

    def find(self) -> Path | None:
        """Return the checkpoint to restore, which is intact, or None. "auto" skips damaged ones. Raises DataError."""
        paths = collective_io(self._candidates, self.mesh, on_rank_0)
        for self._found in paths:
            try:
                check_all_files(self._found, self.mesh)
                return self._found
            except DamagedCheckpoint as error:
                if self.load_dir != AUTO:
                    raise
                log.warning("%s Trying the previous one.", error)
        if paths:
            raise DataError(
                f"every checkpoint in {self.save_dir} is damaged: {', '.join(path.name for path in paths)}; the "
                'log says how. TrainerArgs.ckpt_load_dir = "" and another ckpt_save_dir train from the start.'
            )
        return None

    def restore(self, state: TrainState) -> bool:
        """Load the checkpoint of ``find``; return whether there is one. Raises DataError."""
        path = self._found or self.find()
        self._found = None
        if path is None:
            return False
        load(path, state, self.mesh, self.load_options, is_checked=True)
        resumes = self.load_options.optimizer
        if resumes and self._is_own(path):
            self.newest_iteration = state.iteration
            if self._lock is not None:
                self._delete_older(state.iteration)
        log.info("%s %s", "resuming from" if resumes else "starting from the weights of", path)
        return True

    def load_weights(self, iteration: int, state: TrainState) -> bool:
        """Load the weights of a checkpoint in ``save_dir``, and nothing else. Returns False if there is none."""
        self.wait()
        path = folder.checkpoint_path(self.save_dir, iteration)
        if not on_rank_0(path.is_dir, self.mesh.world_group):
            return False
        load(path, state, self.mesh, LoadOptions(strict=False, optimizer=False))
        return True

    def _candidates(self) -> list[Path]:
        return candidates(self.load_dir, self.save_dir)

    def _is_own(self, path: Path) -> bool:
        return path.resolve().parent == self.save_dir.resolve()

    def _write(self, snapshot: Snapshot, mesh: Mesh) -> None:
        path = write(self.save_dir, snapshot, mesh)
        collective_io(lambda: self._publish(path) if mesh.is_main else None, mesh)

    def _link(self, name: str, path: Path) -> None:
        folder.set_link(self.save_dir, name, path)
        if self._mirror is not None:
            self._mirror.upload(path)

    def _publish(self, path: Path) -> None:
        self._link(LATEST, path)
        size = sum(entry["bytes"] for entry in folder.read_manifest(path).values())
        log.info("saved %s (%.3g MB)", path, size / 1e6)
        self._delete_older(folder.iteration_of(path))

    def _delete_older(self, iteration: int) -> None:
        if self.keep_last is not None:
            folder.delete_older(self.save_dir, iteration, self.keep_last)

    def _claim(self) -> Path:
        try:
            self._is_new = folder.make(self.save_dir)
            self._lock = DirectoryLock(self.save_dir, "TrainerArgs.ckpt_save_dir")
            if self._mirror is not None:
                self._mirror.fetch()
            self._check_others()
            return folder.begin(self.save_dir / secrets.token_hex(8))
        except OSError as error:
            raise ConfigError(
                f"TrainerArgs.ckpt_save_dir: the directory '{self.save_dir}' cannot be written: "
                f"{error.strerror or error}. Free space or permissions there, or give another directory."
            ) from error

    def _check_others(self) -> None:
        others = folder.complete_checkpoints(self.save_dir)
        own = self.load_options.optimizer and any(map(self._is_own, self._candidates()))
        if others and not own:
            raise ConfigError(
                f"TrainerArgs.ckpt_save_dir: '{self.save_dir}' holds the checkpoints of another run "
                f"({others[0].name}{', …' if len(others) > 1 else ''}), which are never overwritten. Continue from "
                'them (TrainerArgs.ckpt_load_dir = "auto"), give another directory, or delete them.'
            )

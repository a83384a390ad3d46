"""Writing and reading checkpoints.

A checkpoint is a directory ``iteration_<n>``: ``tensors/`` (torch.distributed.checkpoint, each rank its shards),
``progress.json``, ``operative.gin``, ``rng_rank<r>.pt`` and ``manifest.json``. It is written under another name and
renamed when every byte is on the disk, so a directory of that name is always complete, and is never written again.
Then ``latest`` points at it: that is the commit.
"""

from __future__ import annotations

import logging
from pathlib import Path

from hstu.checkpoint import directory as place
from hstu.checkpoint.agree import agree
from hstu.checkpoint.background import Background
from hstu.checkpoint.load import load
from hstu.checkpoint.manifest import MANIFEST, DamagedCheckpoint
from hstu.checkpoint.match import LoadOptions
from hstu.checkpoint.save import Contents, HostCopies, contents_of, write
from hstu.checkpoint.state import TrainState
from hstu.config.errors import ConfigError, DataError
from hstu.parallel.mesh import Mesh

log = logging.getLogger(__name__)

AUTO = "auto"


class CheckpointStore:
    """The checkpoints of one run: where to save them and where to start from. All methods are collective.

    ``keep_last``: how many to leave, the best aside; None: all. ``background``: writes them while training goes on.
    """

    def __init__(
        self,
        save_dir: str | Path,
        load_dir: str,
        mesh: Mesh,
        keep_last: int | None = None,
        background: Background | None = None,
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
        """Make sure, before a run begins that will save, that it can do so without touching another run's checkpoints.

        Call it after ``restore``. Raises ConfigError.
        """
        agree(lambda: self._claim() if self.mesh.is_main else None, self.mesh)

    def save(self, state: TrainState) -> None:
        """Save a checkpoint of ``state``, which may change when this returns.

        With a background only the former one is complete when this returns; ``poll`` and ``wait`` tell of this one.
        Raises CheckpointFailure where the file system refuses.
        """
        if self._background is None:
            self._write(contents_of(state, self.mesh), self.mesh)
        else:
            self._background.wait()
            contents = contents_of(state, self.mesh, self._copies)
            self._background.start(lambda mesh: self._write(contents, mesh))
        self.newest_iteration = state.iteration

    def keep(self, iteration: int) -> None:
        """Let ``best`` point at a checkpoint that has been saved: it is not deleted until another one is the best."""

        def point(mesh: Mesh) -> None:
            path = place.place_of(self.save_dir, iteration)
            agree(lambda: place.point(self.save_dir, place.BEST, path) if mesh.is_main else None, mesh)

        if self._background is None:
            point(self.mesh)
        else:
            self._background.start(point)

    @property
    def is_saving(self) -> bool:
        """Whether ``poll`` or ``wait`` have still to tell of a save in the background; the same on all ranks."""
        return self._background is not None and self._background.is_working

    def poll(self) -> None:
        """Raise what has gone wrong with a save in the background; to be called in every step."""
        if self._background is not None:
            self._background.poll()

    def wait(self) -> None:
        """Return when everything is written; raise what has gone wrong."""
        if self._background is not None:
            self._background.wait()

    def close(self) -> None:
        """Let a save in the background end, in a run that has failed."""
        if self._background is not None:
            self._background.close()

    def restore(self, state: TrainState) -> bool:
        """Load the checkpoint that the configuration asks for, if any; False where there is none.

        "auto" takes an older one where the newest is damaged. Raises DataError where none is good.
        """
        candidates = agree(lambda: _candidates(self.load_dir, str(self.save_dir)), self.mesh)[0]
        for path in candidates:
            try:
                load(path, state, self.mesh, self._load_options)
            except DamagedCheckpoint as error:
                if self.load_dir != AUTO:
                    raise
                log.warning("%s Trying the one before.", error)
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
                'log tells how. TrainerArgs.ckpt_load_dir = "" and another ckpt_save_dir train from the start.'
            )
        return False

    def _is_own(self, path: Path) -> bool:
        """Whether a checkpoint lies where this run saves its own."""
        return path.resolve().parent == self.save_dir.resolve()

    def _write(self, contents: Contents, mesh: Mesh) -> None:
        path = write(self.save_dir, contents, mesh)
        agree(lambda: self._publish(path) if mesh.is_main else None, mesh)

    def _publish(self, path: Path) -> None:
        place.point(self.save_dir, place.LATEST, path)
        self._delete_older(place.iteration_of(path))

    def _delete_older(self, iteration: int | None) -> None:
        """Delete what is not to be kept beside the checkpoint of ``iteration``, if there is one."""
        if self._keep_last is not None and iteration is not None:
            place.delete_older(self.save_dir, iteration, self._keep_last)

    def _claim(self) -> None:
        try:
            place.make(self.save_dir)
            place.remove_leftovers(self.save_dir)
            place.begin(self.save_dir, 0).rmdir()
        except OSError as error:
            raise ConfigError(
                f"TrainerArgs.ckpt_save_dir: the directory '{self.save_dir}' cannot be written: "
                f"{error.strerror or error}. Free space or permissions there, or give another directory."
            ) from error
        others = place.complete(self.save_dir)
        if others and (self._restored is None or not self._is_own(self._restored)):
            raise ConfigError(
                f"TrainerArgs.ckpt_save_dir: '{self.save_dir}' holds the checkpoints of another run "
                f"({others[0].name}{', …' if len(others) > 1 else ''}), which are never overwritten. Go on from them "
                '(TrainerArgs.ckpt_load_dir = "auto"), or give another directory, or delete them.'
            )
        self._delete_older(self.newest_iteration)


def find(load_dir: str, save_dir: str) -> Path | None:
    """The checkpoint that ``load_dir`` means: itself, the latest in it, or ("auto") the latest in ``save_dir`` if any.

    Raises DataError where a directory was named and has no complete checkpoint.
    """
    return next(iter(_candidates(load_dir, save_dir)), None)


def _candidates(load_dir: str, save_dir: str) -> list[Path]:
    """The same, and then what else may be tried if that is damaged."""
    if not load_dir:
        return []
    if load_dir == AUTO:
        return place.by_preference(Path(save_dir))
    path = Path(load_dir)
    found = [path] if (path / MANIFEST).is_file() else place.by_preference(path)[:1]
    if not found:
        raise DataError(
            f'no complete checkpoint in {path} (TrainerArgs.ckpt_load_dir). Give a directory "iteration_<n>" that '
            f'holds a {MANIFEST}, the directory above such ones, "auto" or "".'
        )
    return found

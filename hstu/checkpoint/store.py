"""Writing and reading checkpoints.

A checkpoint is a directory ``iteration_<n>``: ``tensors/`` (torch.distributed.checkpoint, each rank its shards),
``progress.json``, ``operative.gin``, ``rng_rank<r>.pt`` and ``manifest.json``. It is written under another name and
renamed when every byte is on the disk, so a directory of that name is always complete.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from hstu.checkpoint.agree import agree
from hstu.checkpoint.load import load
from hstu.checkpoint.manifest import MANIFEST
from hstu.checkpoint.match import LoadOptions
from hstu.checkpoint.save import save
from hstu.checkpoint.state import TrainState
from hstu.config.errors import DataError
from hstu.parallel.mesh import Mesh

log = logging.getLogger(__name__)

AUTO = "auto"
_NAME = re.compile(r"iteration_(\d+)")


class CheckpointStore:
    """The checkpoints of one run: where to save them and where to start from."""

    def __init__(
        self, save_dir: str | Path, load_dir: str, mesh: Mesh, load_options: LoadOptions | None = None
    ) -> None:
        self.save_dir = Path(save_dir)
        self.load_dir = load_dir
        self.mesh = mesh
        self.load_options = load_options or LoadOptions()
        self.newest_iteration: int | None = None
        """Iteration of the last checkpoint saved or restored by this run."""

    def save(self, state: TrainState) -> Path:
        """Save a checkpoint of ``state``. Collective."""
        path = save(self.save_dir, state, self.mesh)
        self.newest_iteration = state.iteration
        return path

    def restore(self, state: TrainState) -> bool:
        """Load the checkpoint that the configuration asks for, if any; False where there is none. Collective."""
        path = agree(lambda: find(self.load_dir, str(self.save_dir)), self.mesh)[0]
        if path is None:
            return False
        load(path, state, self.mesh, self.load_options)
        self.newest_iteration = state.iteration
        log.info("resuming from %s" if self.load_options.optimizer else "starting from the weights of %s", path)
        return True


def find(load_dir: str, save_dir: str) -> Path | None:
    """The checkpoint that ``load_dir`` means: itself, the newest in it, or ("auto") the newest in ``save_dir`` if any.

    Raises DataError where a directory was named and has no complete checkpoint.
    """
    if not load_dir:
        return None
    if load_dir == AUTO:
        return _newest(Path(save_dir))
    path = Path(load_dir)
    found = path if (path / MANIFEST).is_file() else _newest(path)
    if found is None:
        raise DataError(
            f'no complete checkpoint in {path} (TrainerArgs.ckpt_load_dir). Give a directory "iteration_<n>" that '
            f'holds a {MANIFEST}, the directory above such ones, "auto" or "".'
        )
    return found


def _newest(directory: Path) -> Path | None:
    complete = [path for path in directory.glob("iteration_*") if _NAME.fullmatch(path.name)]
    complete = [path for path in complete if (path / MANIFEST).is_file()]
    return max(complete, key=lambda path: int(path.name.removeprefix("iteration_")), default=None)

"""Finds the checkpoint for a path, and the run of a checkpoint; run.json in both directories identifies the run."""

import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from hstu.base.errors import DataError
from hstu.base.json_shape import check_shape
from hstu.checkpoint.directory import BEST, MANIFEST, checkpoint_path, link_target, restore_candidates
from hstu.checkpoint.mirror import local_checkpoint

AUTO = "auto"
LAST = "last"
RUN_FILE = "run.json"
GIN = "operative.gin"
_SHOWN = 10


@dataclass(frozen=True)
class Run:
    """Identity and directories of a run."""

    id: str
    """Random hex string, drawn when the run's directory was created."""
    directory: str
    """Absolute path of the run's directory."""
    checkpoints: str | None
    """Absolute path of the directory with its checkpoints. None: it saves none."""

    @classmethod
    def of(cls, directory: Path, checkpoints: Path | None, *, continues: bool) -> Self:
        """Describe the run that writes to ``directory``: the run in its run.json with ``continues``, else a new run."""
        earlier = cls.read(directory) if continues else None
        saved_in = None if checkpoints is None else str(checkpoints.absolute())
        return cls(earlier.id if earlier else uuid.uuid4().hex, str(directory.absolute()), saved_in)

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """Read run.json of a run, a checkpoint or an export; None if absent. Raises DataError if it is damaged."""
        path = directory / RUN_FILE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            check_shape(found, {"id": str, "directory": str, "checkpoints": str | None})
            return cls(**found)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path} cannot be read as the description of a run ({error})") from error

    def text(self) -> str:
        """Return the content of run.json."""
        return json.dumps(asdict(self), indent=1) + "\n"


def locate(name: str | Path, which: str = LAST) -> Path:
    """Return the checkpoint or export at this path, or one of a run or directory. Raises DataError if it is missing.

    ``which``: "last" (the newest), "best", or an iteration.
    """
    found = _complete(local_checkpoint(name, which))
    if which == LAST:
        return found[0]
    if which == BEST:
        chosen = best_of(found[0])
    else:
        chosen = next((path for path in found if path == checkpoint_path(path.parent, int(which))), None)
    if chosen is None:
        has = ", ".join(path.name for path in found[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
        raise DataError(f"{name} has no checkpoint {which!r}; it has {has}")
    return chosen


def is_choice(name: str | Path | None) -> bool:
    """Return whether this says which checkpoint of a run (see ``locate``), rather than where one is."""
    return str(name) in (LAST, BEST) or str(name).isdecimal()


def best_of(last: Path) -> Path | None:
    """Return the best checkpoint up to ``last`` in its directory, if the run chose one."""
    best = link_target(last.parent, BEST)
    return best if best is not None and (best / MANIFEST).is_file() and best.name <= last.name else None


def is_run(directory: Path) -> bool:
    """Return whether this is a run's directory, rather than a checkpoint, a directory of checkpoints or an export."""
    return not (directory / MANIFEST).is_file() and (directory / GIN).is_file()


def _complete(path: Path) -> list[Path]:
    """Return the checkpoint or export ``path``, or those of a run or directory, the last first. Raises DataError."""
    if is_run(path):
        return _checkpoints_of_run(path)
    if any((path / file).is_file() for file in ("serving/delta.json", "delta.json")):
        text = "is a delta for servers: it has only what changed since an earlier export. Give the run that it is of"
        raise DataError(f"{path} {text}, or its checkpoint")
    found = [path] if (path / MANIFEST).is_file() else restore_candidates(path)
    if not found:
        raise DataError(
            f'no complete checkpoint in {path} (TrainerArgs.ckpt_load_dir). Give a directory "iteration_<n>" that '
            f'holds a {MANIFEST}, the directory above such directories, the directory of a run, "auto" or "". '
            "hstu-import-checkpoint reads those of other trainers"
        )
    return found


def _checkpoints_of_run(directory: Path) -> list[Path]:
    run = Run.read(directory)
    if run is None:
        raise DataError(f"the run {directory} has no {RUN_FILE}. Name a checkpoint itself.")
    if run.checkpoints is None:
        raise DataError(f"the run {directory} has saved no checkpoint: its TrainerArgs.ckpt_save_interval saves none")
    # The directory may have been moved with or without the checkpoints.
    together = Path(os.path.normpath(directory / os.path.relpath(run.checkpoints, run.directory)))
    directories = list(dict.fromkeys([together, Path(run.checkpoints)]))
    found = [path for saved_in in directories for path in restore_candidates(saved_in)]
    if own := [path for path in found if belongs(path, directory)]:
        return own
    others = f", which holds {found[0].name} of {_run_of(found[0])}" if found else ""
    raise DataError(
        f"the run {directory} has no checkpoint in {directories[-1]}{others}. Name a checkpoint itself to use that one."
    )


def check_belongs(checkpoint: Path, directory: Path) -> None:
    """Raise DataError if a checkpoint or an export does not belong to the run in ``directory``."""
    if not belongs(checkpoint, directory):
        raise DataError(
            f"{checkpoint} is not of the run {directory}, but of {_run_of(checkpoint)}. Give the checkpoint alone, and "
            "its own configuration is used."
        )


def belongs(checkpoint: Path, directory: Path) -> bool:
    """Return whether a checkpoint or an export belongs to the run in ``directory``."""
    of_checkpoint, run = Run.read(checkpoint), Run.read(directory)
    return of_checkpoint is not None and run is not None and run.id == of_checkpoint.id


def _run_of(checkpoint: Path) -> str:
    run = Run.read(checkpoint)
    return f"the run {run.directory}" if run else "an unknown run"


def candidates(load_dir: str, save_dir: str | Path) -> list[Path]:
    """Return the checkpoint that TrainerArgs.ckpt_load_dir selects, followed by fallbacks if it is damaged.

    It is ``load_dir`` itself, or the latest checkpoint in it or of the run in it. "auto" gives the latest in
    ``save_dir``, then the others there. Raises DataError if a named directory has no complete checkpoint.
    """
    if not load_dir:
        return []
    if load_dir == AUTO:
        return restore_candidates(Path(save_dir))
    return _complete(Path(load_dir))[:1]

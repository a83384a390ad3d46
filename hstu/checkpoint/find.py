"""Which checkpoint a path means, and which run a checkpoint belongs to.

``run.json`` in the directory of a run and in its checkpoints names the run. Checkpoints of version 0.2.0 and earlier
have no such file: they belong to the run whose configuration they hold.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from hstu.base.errors import DataError
from hstu.checkpoint import directory as folder
from hstu.checkpoint.directory import MANIFEST
from hstu.config.gin_scan import scan_stored

AUTO = "auto"
RUN_FILE = "run.json"
GIN = "operative.gin"


@dataclass(frozen=True)
class Run:
    """Names a run and says where its files are."""

    id: str
    """Drawn at random when the directory of the run was created."""
    directory: str
    """Absolute path of the run's directory."""
    checkpoints: str | None
    """Absolute path of the directory with its checkpoints. None: it saves none."""

    @classmethod
    def of(cls, directory: Path, checkpoints: Path | None, *, continues: bool) -> Run:
        """Describe the run that writes to ``directory``: that of its run.json if it ``continues``, else a new one."""
        earlier = cls.read(directory) if continues else None
        saved_in = None if checkpoints is None else str(checkpoints.absolute())
        return cls(earlier.id if earlier else uuid.uuid4().hex, str(directory.absolute()), saved_in)

    @classmethod
    def read(cls, directory: Path) -> Run | None:
        """Read run.json of a run, a checkpoint or an export. None: there is none. Raises DataError if it is damaged."""
        path = directory / RUN_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            run = cls(**fields)
            if not (isinstance(run.id, str) and isinstance(run.directory, str)):
                raise ValueError("id and directory must be strings")
            if not isinstance(run.checkpoints, str | None):
                raise ValueError("checkpoints must be a string or null")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path} cannot be read as the description of a run ({error})") from error
        return run

    def text(self) -> str:
        """Return the content of run.json."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def places_of_checkpoints(self, directory: Path) -> list[Path]:
        """Return where the checkpoints may be. ``directory``: where the directory of the run is now.

        It may have been moved together with the checkpoints, or alone.
        """
        if self.checkpoints is None:
            return []
        together = Path(os.path.normpath(directory / os.path.relpath(self.checkpoints, self.directory)))
        alone = Path(self.checkpoints)
        return [together] if together.resolve() == alone.resolve() else [together, alone]


def locate(name: str | Path) -> Path:
    """Return the checkpoint or export at this path, or the newest checkpoint in it, or the newest of this run.

    Raises DataError.
    """
    return candidates(f"{Path(name)}/", "")[0]  # with the slash, "auto" is a directory as well


def is_run(directory: Path) -> bool:
    """Return whether this is the directory of a run, rather than a checkpoint, a directory of them or an export."""
    return not (directory / MANIFEST).is_file() and (directory / GIN).is_file()


def checkpoint_of_run(directory: Path) -> Path:
    """Return the newest checkpoint of a run. Raises DataError if there is none of exactly this run."""
    run = Run.read(directory)
    if run is None:
        places = [_saved_in(directory / GIN)]
    elif run.checkpoints is None:
        raise DataError(f"the run {directory} has saved no checkpoint: its TrainerArgs.ckpt_save_interval is -1")
    else:
        places = run.places_of_checkpoints(directory)
    found = [path for place in places for path in folder.restore_candidates(place)]
    for path in found:
        if belongs(path, directory):
            return path
    text = f"the run {directory} has no checkpoint in {places[-1]}"
    if found:
        others = ", ".join(path.name for path in found[:3]) + (", …" if len(found) > 3 else "")
        text += f", which holds {others} of {_run_of(found[0])}"
    raise DataError(f"{text}. Name a checkpoint itself to use that one.")


def check_belongs(checkpoint: Path, directory: Path) -> None:
    """Raise DataError if a checkpoint or an export is not of the run in ``directory``."""
    if not belongs(checkpoint, directory):
        raise DataError(
            f"{checkpoint} is not of the run {directory}, but of {_run_of(checkpoint)}. Give the checkpoint alone, and "
            "its own configuration is used."
        )


def belongs(checkpoint: Path, directory: Path) -> bool:
    """Return whether a checkpoint or an export is of the run in ``directory``."""
    of_checkpoint, run = Run.read(checkpoint), Run.read(directory)
    if of_checkpoint is not None:
        return run is not None and run.id == of_checkpoint.id
    # Written before there was run.json. A resumed run may have several configurations.
    gin = checkpoint / GIN
    return gin.is_file() and any(path.read_bytes() == gin.read_bytes() for path in directory.glob("operative*.gin"))


def _run_of(checkpoint: Path) -> str:
    run = Run.read(checkpoint)
    return f"the run {run.directory}" if run else "a run of an earlier version of this program with other settings"


def _saved_in(gin: Path) -> Path:
    """Return the directory of checkpoints that a configuration of an earlier version names."""
    bindings = scan_stored(gin.read_text(encoding="utf-8"), str(gin)).bindings
    named = [binding.value for binding in bindings if binding.name == "TrainerArgs.ckpt_save_dir"]
    if not named or not isinstance(named[-1], str):
        raise DataError(f"{gin} does not say where its run saved checkpoints (TrainerArgs.ckpt_save_dir)")
    return Path(named[-1])


def find_checkpoint(load_dir: str, save_dir: str | Path) -> Path | None:
    """Return the first of ``candidates``; None where there is none to load."""
    return next(iter(candidates(load_dir, save_dir)), None)


def candidates(load_dir: str, save_dir: str | Path) -> list[Path]:
    """Return the checkpoint that TrainerArgs.ckpt_load_dir means, and those to try if it is damaged.

    It is ``load_dir`` itself, the latest in it, the latest of the run in it, or with "auto" the latest in ``save_dir``
    followed by the others there.
    Raises DataError if a named directory has no complete checkpoint.
    """
    if not load_dir:
        return []
    if load_dir == AUTO:
        return folder.restore_candidates(Path(save_dir))
    path = Path(load_dir)
    if is_run(path):
        return [checkpoint_of_run(path)]
    found = [path] if (path / MANIFEST).is_file() else folder.restore_candidates(path)[:1]
    if not found:
        raise DataError(
            f'no complete checkpoint in {path} (TrainerArgs.ckpt_load_dir). Give a directory "iteration_<n>" that '
            f'holds a {MANIFEST}, the directory above such directories, the directory of a run, "auto" or "".'
        )
    return found

"""Writing and reading checkpoints.

A checkpoint is a directory ``iteration_<n>``: ``tensors/`` (torch.distributed.checkpoint, each rank its shards),
``progress.json``, ``operative.gin``, ``rng_rank<r>.pt`` and ``manifest.json``. It is written under another name and
renamed when every byte is on the disk, so a directory of that name is always complete.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hstu.checkpoint.manifest import (
    MANIFEST,
    describe_files,
    file_problems,
    read_manifest,
    sync_to_disk,
    write_manifest,
)
from hstu.checkpoint.state import TrainState, random_state, set_random_state
from hstu.config.errors import DataError
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh

log = logging.getLogger(__name__)

AUTO = "auto"
_NAME = re.compile(r"iteration_(\d+)")
_TEMPORARY = ".writing_"
_SHOWN_PROBLEMS = 10
T = TypeVar("T")


class CheckpointStore:
    """The checkpoints of one run: where to save them and where to start from."""

    def __init__(self, save_dir: str | Path, load_dir: str, mesh: Mesh) -> None:
        self.save_dir = Path(save_dir)
        self.load_dir = load_dir
        self.mesh = mesh
        self.newest_iteration: int | None = None
        """Iteration of the last checkpoint saved or restored by this run."""

    def save(self, state: TrainState) -> Path:
        """Save a checkpoint of ``state``. Collective."""
        path = save(self.save_dir, state, self.mesh)
        self.newest_iteration = state.iteration
        return path

    def restore(self, state: TrainState) -> bool:
        """Load the checkpoint that the configuration asks for, if any; False where there is none. Collective."""
        path = _agree(lambda: find(self.load_dir, str(self.save_dir)), self.mesh)[0]
        if path is None:
            return False
        load(path, state, self.mesh)
        self.newest_iteration = state.iteration
        log.info("resuming from %s", path)
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


def save(directory: str | Path, state: TrainState, mesh: Mesh) -> Path:
    """Write ``directory/iteration_<n>``. Collective; on any rank's failure all ranks raise and nothing is committed."""
    root = Path(directory)
    final = root / f"iteration_{state.iteration:08d}"
    temporary = root / f"{_TEMPORARY}{final.name}"
    _agree(lambda: _make_empty(temporary) if mesh.is_main else None, mesh)
    _agree(lambda: _write_tensors(temporary, state, mesh), mesh)
    parts = _agree(lambda: _write_own_files(temporary, state, mesh), mesh)
    _agree(lambda: _commit(temporary, final, parts) if mesh.is_main else None, mesh)
    return final


def load(path: str | Path, state: TrainState, mesh: Mesh) -> None:
    """Read a checkpoint into ``state`` in place. Collective; the number of ranks may differ from that at saving.

    Raises DataError, on all ranks alike, for damaged or missing files and for tensors that the checkpoint lacks or
    has in another shape. On another number of ranks, or of ranks in a tensor-parallel group, the dropout generators
    keep their fresh seeds.
    """
    root = Path(path)
    _raise_problems(root, _agree(lambda: _share_of_file_problems(root, mesh), mesh))
    _raise_problems(root, _agree(lambda: _tensor_problems(root, state), mesh))
    _agree(lambda: _read_tensors(root, state, mesh), mesh)
    progress = json.loads((root / "progress.json").read_text())
    state.load_progress(progress)
    ranks, group = progress["world_size"], progress.get("tensor_parallel_size", 1)
    if (ranks, group) == (mesh.world_size, mesh.tp_size):  # the generators of a group must agree
        set_random_state(torch.load(root / f"rng_rank{mesh.rank}.pt", weights_only=True), mesh.device)
    else:
        log.info("%s was saved by %d ranks in groups of %d: dropout starts from fresh seeds", root, ranks, group)


def _newest(directory: Path) -> Path | None:
    complete = [path for path in directory.glob("iteration_*") if _NAME.fullmatch(path.name)]
    complete = [path for path in complete if (path / MANIFEST).is_file()]
    return max(complete, key=lambda path: int(path.name.removeprefix("iteration_")), default=None)


def _make_empty(directory: Path) -> None:
    """A fresh directory, in place of what an interrupted save may have left."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _write_tensors(root: Path, state: TrainState, mesh: Mesh) -> None:
    dcp.save(state.tensors(), storage_writer=dcp.FileSystemWriter(root / "tensors"), process_group=mesh.world_group)


def _write_own_files(root: Path, state: TrainState, mesh: Mesh) -> dict[str, dict[str, Any]]:
    """Write this rank's files; descriptions of them and of its tensor files."""
    rng = root / f"rng_rank{mesh.rank}.pt"
    torch.save(random_state(mesh.device), rng)
    files = [rng, *(root / "tensors").glob(f"__{mesh.rank}_*")]
    if mesh.is_main:
        ranks = {"world_size": mesh.world_size, "tensor_parallel_size": mesh.tp_size}
        progress, gin = root / "progress.json", root / "operative.gin"
        progress.write_text(json.dumps(state.progress() | ranks, indent=1))
        gin.write_text(state.operative_gin)
        files += [progress, gin, root / "tensors" / ".metadata"]
    return describe_files(root, files)


def _commit(temporary: Path, final: Path, parts: list[dict[str, dict[str, Any]]]) -> None:
    sync_to_disk(temporary / "tensors")
    write_manifest(temporary, {name: entry for part in parts for name, entry in part.items()})
    if final.exists():  # an earlier run got here, too; never write into it
        replaced = final.with_name(f".replaced_{final.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced)
    else:
        temporary.rename(final)
    sync_to_disk(final.parent)


def _share_of_file_problems(root: Path, mesh: Mesh) -> list[str]:
    """Each rank checks its part of the files."""
    files = read_manifest(root)
    return file_problems(root, {name: files[name] for name in sorted(files)[mesh.rank :: mesh.world_size]})


def _tensor_problems(root: Path, state: TrainState) -> list[str]:
    """What this run has and the checkpoint has not, or not in the same shape."""
    stored = dcp.FileSystemReader(root / "tensors").read_metadata().state_dict_metadata
    problems = []
    for name, tensor in state.tensors().items():
        entry = stored.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            problems.append(f"{name} is not in the checkpoint")
        elif entry.size != tensor.size():
            problems.append(f"{name} is {tuple(entry.size)} in the checkpoint, {tuple(tensor.size())} in this run")
    return problems


def _read_tensors(root: Path, state: TrainState, mesh: Mesh) -> None:
    dcp.load(state.tensors(), storage_reader=dcp.FileSystemReader(root / "tensors"), process_group=mesh.world_group)


def _raise_problems(root: Path, by_rank: list[list[str]]) -> None:
    problems = list(dict.fromkeys(problem for part in by_rank for problem in part))
    if not problems:
        return
    shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS])
    more = f"\n  and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    raise DataError(f"cannot load the checkpoint {root}:\n{shown}{more}\nLoad another one, or change the model back.")


def _agree(part: Callable[[], T], mesh: Mesh) -> list[T]:
    """Do a rank's part of the work and learn whether all did theirs: all results, or an error on every rank alike.

    CheckpointException, which torch.distributed.checkpoint raises, is no Exception but a BaseException.
    """
    mesh.progress.mark()
    result: T | None = None
    failure: Exception | None = None
    try:
        result = part()
    except CheckpointException as error:
        failure = RuntimeError(str(error))
    except Exception as error:
        failure = error
    outcomes = gather_objects((result, failure), mesh.world_group)
    for rank, (_, problem) in enumerate(outcomes):
        if isinstance(problem, DataError):
            raise problem
        if problem is not None:
            raise RuntimeError(f"checkpointing failed on rank {rank}: {problem}") from (failure or problem)
    return [value for value, _ in outcomes]

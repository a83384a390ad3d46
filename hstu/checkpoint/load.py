"""Reading a checkpoint into a run, on any number of ranks."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hstu.checkpoint.agree import agree
from hstu.checkpoint.manifest import DamagedCheckpoint, file_problems, read_manifest
from hstu.checkpoint.state import TrainState, set_random_state
from hstu.config.errors import DataError
from hstu.parallel.mesh import Mesh

log = logging.getLogger(__name__)

_SHOWN_PROBLEMS = 10


def load(path: str | Path, state: TrainState, mesh: Mesh) -> None:
    """Read a checkpoint into ``state`` in place. Collective; the number of ranks may differ from that at saving.

    Raises, on all ranks alike, DamagedCheckpoint for damaged or missing files and DataError for tensors that the
    checkpoint lacks or has in another shape. On another number of ranks, or of ranks in a tensor-parallel group,
    the dropout generators keep their fresh seeds.
    """
    root = Path(path)
    _raise_problems(root, agree(lambda: _share_of_file_problems(root, mesh), mesh), DamagedCheckpoint)
    _raise_problems(root, agree(lambda: _tensor_problems(root, state), mesh))
    agree(lambda: _read_tensors(root, state, mesh), mesh)
    progress = json.loads((root / "progress.json").read_text())
    state.load_progress(progress)
    ranks, group = progress["world_size"], progress.get("tensor_parallel_size", 1)
    if (ranks, group) == (mesh.world_size, mesh.tp_size):  # the generators of a group must agree
        set_random_state(torch.load(root / f"rng_rank{mesh.rank}.pt", weights_only=True), mesh.device)
    else:
        log.info("%s was saved by %d ranks in groups of %d: dropout starts from fresh seeds", root, ranks, group)


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


def _raise_problems(root: Path, by_rank: list[list[str]], kind: type[DataError] = DataError) -> None:
    problems = list(dict.fromkeys(problem for part in by_rank for problem in part))
    if not problems:
        return
    shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS])
    more = f"\n  and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    raise kind(f"cannot load the checkpoint {root}:\n{shown}{more}\nLoad another one, or change the model back.")

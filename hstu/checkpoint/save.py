"""Writing a checkpoint: aside, and renamed into place when every byte is on the disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from hstu.checkpoint import directory as place
from hstu.checkpoint.agree import CheckpointFailure, agree
from hstu.checkpoint.dynamic import PlainTables, copy_of_tables, write_dynamic_tables
from hstu.checkpoint.manifest import Files, describe_files, sync_to_disk, write_manifest
from hstu.checkpoint.state import TrainState, random_state
from hstu.checkpoint.tensor_files import TENSORS
from hstu.checkpoint.torch_file import system_errors, write_file
from hstu.parallel.cut_tensor import CutTensor
from hstu.parallel.embedding import dynamic_tables
from hstu.parallel.mesh import Mesh

HostCopies = dict[MetadataIndex, Tensor]
"""Parts of tensors that this rank may have to write → copies in host memory."""


@dataclass(frozen=True)
class Contents:
    """What a rank has for a checkpoint. All but the tensors is as it was when this was made."""

    iteration: int
    tensors: dict[str, Tensor | CutTensor]
    """Live ones."""
    copies: HostCopies | None
    """Their content at some moment; None: what they hold when they are written."""
    progress: str
    operative_gin: str
    random_state: dict[str, Tensor]
    dynamic: PlainTables
    """What this rank holds of dynamic tables."""


def contents_of(state: TrainState, mesh: Mesh, copies: HostCopies | None = None) -> Contents:
    """What is to be saved of ``state``.

    ``copies``: copy the tensors there (into the memory of an earlier copy, where it fits), so that ``state`` may change
    before they are written; the copies are complete when this returns.
    """
    tensors = state.tensors()
    if copies is not None:
        _copy_to_host(tensors, copies, mesh.device)
    ranks = {"world_size": mesh.world_size, "tensor_parallel_size": mesh.tp_size}
    progress = json.dumps(state.progress() | ranks, indent=1)
    random, dynamic = random_state(mesh.device), copy_of_tables(dynamic_tables(state.model))
    return Contents(state.iteration, tensors, copies, progress, state.operative_gin, random, dynamic)


def _copy_to_host(tensors: dict[str, Tensor | CutTensor], copies: HostCopies, device: torch.device) -> None:
    parts = [item.index for item in create_default_local_save_plan(tensors, is_coordinator=True).items]
    for index in set(copies) - set(parts):
        del copies[index]
    for index in parts:
        part = _part(tensors, index)
        copy = copies.get(index)
        if copy is None or (copy.shape, copy.dtype) != (part.shape, part.dtype):
            copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
        copies[index] = copy.copy_(part, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Planner(dcp.DefaultSavePlanner):
    """Writes copies, where there are any: the live tensors, which it plans with, then only say what goes where.

    torch's own async_save (2.13) does not copy ShardedTensors, so it would write them while they change.
    """

    def __init__(self, copies: HostCopies | None) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return _part(self.state_dict, index) if self._copies is None else self._copies[index]


class _Writer(dcp.FileSystemWriter):
    """Tells what the file system has said where it refuses."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with system_errors():
            return super().write_data(plan, planner)


def _part(tensors: dict[str, Any], index: MetadataIndex) -> Tensor:
    """The part of a live tensor that ``index`` names."""
    tensor = tensors[index.fqn]
    part: Tensor = tensor.__get_tensor_shard__(index) if isinstance(tensor, CutTensor) else tensor
    return part.detach()


def save(directory: str | Path, state: TrainState, mesh: Mesh) -> Path:
    """Write ``state`` as ``directory/iteration_<n>``, see ``write``."""
    return write(Path(directory), contents_of(state, mesh), mesh)


def write(directory: Path, contents: Contents, mesh: Mesh) -> Path:
    """Write and commit a checkpoint. Collective; on any rank's failure all ranks raise and nothing is committed.

    Raises CheckpointFailure where the file system refuses.
    """
    iteration = contents.iteration
    try:
        temporary = agree(lambda: place.begin(directory, iteration) if mesh.is_main else Path(), mesh)[0]
        agree(lambda: _write_tensors(temporary, contents, mesh), mesh)
        parts = agree(lambda: _write_own_files(temporary, contents, mesh), mesh)
        return agree(lambda: _commit(temporary, iteration, parts) if mesh.is_main else Path(), mesh)[0]
    except Exception as error:
        if mesh.is_main:
            place.remove_leftovers(directory)
        if not isinstance(error, CheckpointFailure):
            raise
        raise CheckpointFailure(
            f"cannot save {place.place_of(directory, iteration)}: {error}. What was complete before still is: free "
            'space or permissions there and start again with TrainerArgs.ckpt_load_dir = "auto".'
        ) from error


def _write_tensors(root: Path, contents: Contents, mesh: Mesh) -> None:
    writer, planner = _Writer(root / TENSORS), _Planner(contents.copies)
    dcp.save(contents.tensors, storage_writer=writer, planner=planner, process_group=mesh.world_group)


def _write_own_files(root: Path, contents: Contents, mesh: Mesh) -> Files:
    """Write this rank's files; descriptions of them and of its tensor files."""
    rng = root / f"rng_rank{mesh.rank}.pt"
    write_file(contents.random_state, rng)
    dynamic = write_dynamic_tables(root, contents.dynamic, mesh.rank)
    files = [rng, *dynamic, *(root / TENSORS).glob(f"__{mesh.rank}_*")]
    if mesh.is_main:
        progress, gin = root / "progress.json", root / "operative.gin"
        progress.write_text(contents.progress)
        gin.write_text(contents.operative_gin)
        files += [progress, gin, root / TENSORS / ".metadata"]
    return describe_files(root, files)


def _commit(temporary: Path, iteration: int, parts: list[Files]) -> Path:
    sync_to_disk(temporary / TENSORS)
    write_manifest(temporary, {name: entry for part in parts for name, entry in part.items()})
    return place.commit(temporary, iteration)

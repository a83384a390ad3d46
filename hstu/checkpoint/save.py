"""Writes a checkpoint to a temporary directory, and renames it when every byte is on disk."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from hstu.base.files import aside_path, sync_to_disk
from hstu.checkpoint import directory as folder
from hstu.checkpoint.dynamic import DYNAMIC_FILES, TableDicts, to_host
from hstu.checkpoint.find import GIN, RUN_FILE
from hstu.checkpoint.state import TrainState, random_state
from hstu.checkpoint.tensors import INDEX, RANDOM_FILES, TENSORS
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh
from hstu.parallel.shards import ShardedView
from hstu.parallel.tables import dynamic_tables

HostCopies = dict[MetadataIndex, Tensor]
"""Pieces of tensors that this rank may write → copies in host memory."""


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes to a checkpoint. Everything but the live tensors is a copy."""

    iteration: int
    tensors: dict[str, Tensor | ShardedView]
    copies: HostCopies | None
    """Copies of the live tensors. None: save their values at the time of writing."""
    texts: dict[str, str]
    """Name of a file that rank 0 writes → its content."""
    random_state: dict[str, Tensor]
    dynamic: TableDicts

    @classmethod
    def of(cls, state: TrainState, mesh: Mesh, copies: HostCopies | None = None) -> Self:
        """Collect what to save of ``state``, which may change afterwards if ``copies`` (memory to reuse) are given."""
        tensors, metadata = state.tensors(), state.metadata()
        run = {RUN_FILE: state.run} if state.run else {}
        tensors = {  # the shards of this rank, and its part of what is equal on all ranks, which rank 0 need not plan
            name: tensor
            for number, (name, tensor) in enumerate(tensors.items())
            if isinstance(tensor, ShardedView) or number % mesh.world_size == mesh.rank
        }
        if copies is not None:
            _copy_to_host(tensors, copies, mesh.device)
        ranks = {
            "world_size": mesh.world_size,
            "tensor_parallel_size": mesh.tp_size,
            "context_parallel_size": mesh.cp_size,
        }
        return cls(
            iteration=state.iteration,
            tensors=tensors,
            copies=copies,
            texts={"progress.json": json.dumps(metadata | ranks, indent=1), GIN: state.operative_gin} | run,
            random_state=random_state(mesh.device),
            dynamic={name: to_host(table.content()) for name, table in dynamic_tables(state.model).items()},
        )


def _copy_to_host(tensors: dict[str, Tensor | ShardedView], copies: HostCopies, device: torch.device) -> None:
    for index in (item.index for item in create_default_local_save_plan(tensors, is_coordinator=True).items):
        piece = _piece(tensors, index)
        copy = copies.get(index)
        if copy is None or (copy.shape, copy.dtype) != (piece.shape, piece.dtype):
            copy = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=piece.is_cuda)
        copies[index] = copy.copy_(piece, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _piece(tensors: dict[str, Tensor | ShardedView], index: MetadataIndex) -> Tensor:
    tensor = tensors[index.fqn]
    piece = tensor.__get_tensor_shard__(index) if isinstance(tensor, ShardedView) else tensor
    return piece.detach()


class _SavePlanner(dcp.DefaultSavePlanner):
    """Writes copies of the live tensors if there are any. torch's async_save (2.13) does not copy ShardedTensors."""

    def __init__(self, copies: HostCopies | None) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return _piece(self.state_dict, index) if self._copies is None else self._copies[index]


class _Writer(dcp.FileSystemWriter):
    """Raises the file system's OSError, which torch would hide."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with folder.writing_errors():
            return super().write_data(plan, planner)


def write(directory: Path, snapshot: Snapshot, mesh: Mesh) -> Path:
    """Write and commit a checkpoint and return its path. Collective.

    If a rank fails, all ranks raise and nothing is committed. Raises CheckpointFailure if the file system refuses.
    """
    final = folder.checkpoint_path(directory, snapshot.iteration)
    temporary = aside_path(final)
    try:
        folder.collective_io(lambda: folder.begin(final) if mesh.is_main else None, mesh)
        folder.collective_io(lambda: _write_tensors(temporary, snapshot, mesh), mesh)
        own_files = folder.collective_io(lambda: _write_own_files(temporary, snapshot, mesh), mesh)
        files = {name: entry for part in gather_objects(own_files, mesh.world_group) for name, entry in part.items()}
        folder.collective_io(lambda: _commit(final, files) if mesh.is_main else None, mesh)
    except Exception as error:
        if mesh.is_main:
            folder.remove_leftovers(directory)
        if not isinstance(error, folder.CheckpointFailure):
            raise
        raise folder.CheckpointFailure(
            f"cannot save {final}: {error}. Earlier complete checkpoints are intact: free space or permissions there "
            'and start again with TrainerArgs.ckpt_load_dir = "auto".'
        ) from error
    return final


def _write_tensors(root: Path, snapshot: Snapshot, mesh: Mesh) -> None:
    writer, planner = _Writer(root / TENSORS), _SavePlanner(snapshot.copies)
    dcp.save(snapshot.tensors, storage_writer=writer, planner=planner, process_group=mesh.world_group)


def _write_own_files(root: Path, snapshot: Snapshot, mesh: Mesh) -> folder.Files:
    files = [*(root / TENSORS).glob(f"__{mesh.rank}_*"), root / RANDOM_FILES.replace("*", str(mesh.rank))]
    folder.torch_save(snapshot.random_state, files[-1])
    if snapshot.dynamic:
        files.append(root / DYNAMIC_FILES.replace("*", str(mesh.rank)))
        folder.torch_save(snapshot.dynamic, files[-1])
    if mesh.is_main:
        for name, text in snapshot.texts.items():
            (root / name).write_text(text, encoding="utf-8")
        files += [root / TENSORS / INDEX, *(root / name for name in snapshot.texts)]
    return folder.describe_files(root, files)


def _commit(final: Path, files: folder.Files) -> None:
    temporary = aside_path(final)
    for name, entry in files.items():
        if not folder.becomes_visible(temporary / name, entry["bytes"]):
            raise OSError(f"it cannot see all of {name}, of another rank; all hosts must share the directory")
    sync_to_disk(temporary / TENSORS)
    folder.write_manifest(temporary, files)
    folder.commit(final)

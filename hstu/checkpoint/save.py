"""Writing a checkpoint: aside, and renamed into place when every byte is on the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from hstu.checkpoint.agree import agree
from hstu.checkpoint.dynamic import write_dynamic_tables
from hstu.checkpoint.manifest import describe_files, sync_to_disk, write_manifest
from hstu.checkpoint.state import TrainState, random_state
from hstu.checkpoint.tensor_files import TENSORS
from hstu.parallel.cut_tensor import CutTensor
from hstu.parallel.embedding import dynamic_tables
from hstu.parallel.mesh import Mesh

_TEMPORARY = ".writing_"


def save(directory: str | Path, state: TrainState, mesh: Mesh) -> Path:
    """Write ``directory/iteration_<n>``. Collective; on any rank's failure all ranks raise and nothing is committed."""
    root = Path(directory)
    final = root / f"iteration_{state.iteration:08d}"
    temporary = root / f"{_TEMPORARY}{final.name}"
    agree(lambda: _make_empty(temporary) if mesh.is_main else None, mesh)
    agree(lambda: _write_tensors(temporary, state, mesh), mesh)
    parts = agree(lambda: _write_own_files(temporary, state, mesh), mesh)
    agree(lambda: _commit(temporary, final, parts) if mesh.is_main else None, mesh)
    return final


def _make_empty(directory: Path) -> None:
    """A fresh directory, in place of what an interrupted save may have left."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _write_tensors(root: Path, state: TrainState, mesh: Mesh) -> None:
    writer = dcp.FileSystemWriter(root / TENSORS)
    dcp.save(state.tensors(), storage_writer=writer, planner=_Planner(), process_group=mesh.world_group)


class _Planner(dcp.DefaultSavePlanner):
    """Saves CutTensors, too, which are no torch.Tensors."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        held = self.state_dict[index.fqn]
        return held.__get_tensor_shard__(index) if isinstance(held, CutTensor) else super().lookup_object(index)


def _write_own_files(root: Path, state: TrainState, mesh: Mesh) -> dict[str, dict[str, Any]]:
    """Write this rank's files; descriptions of them and of its tensor files."""
    rng = root / f"rng_rank{mesh.rank}.pt"
    torch.save(random_state(mesh.device), rng)
    dynamic = write_dynamic_tables(root, dynamic_tables(state.model), mesh.rank)
    files = [rng, *dynamic, *(root / TENSORS).glob(f"__{mesh.rank}_*")]
    if mesh.is_main:
        ranks = {"world_size": mesh.world_size, "tensor_parallel_size": mesh.tp_size}
        progress, gin = root / "progress.json", root / "operative.gin"
        progress.write_text(json.dumps(state.progress() | ranks, indent=1))
        gin.write_text(state.operative_gin)
        files += [progress, gin, root / TENSORS / ".metadata"]
    return describe_files(root, files)


def _commit(temporary: Path, final: Path, parts: list[dict[str, dict[str, Any]]]) -> None:
    sync_to_disk(temporary / TENSORS)
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

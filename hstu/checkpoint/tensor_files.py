"""Where a checkpoint's tensors lie: cut, as the ranks wrote them, or consolidated in one file of an export."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan

from hstu.checkpoint import safetensors_file
from hstu.parallel.cut_tensor import CutTensor

TENSORS = "tensors"
CONSOLIDATED = "model.safetensors"


class TensorFiles(ABC):
    """The tensors of a checkpoint or an export, to be read."""

    sizes: dict[str, torch.Size]
    """Name → size, of all tensors."""
    dtypes: dict[str, torch.dtype]
    """Name → type."""

    @abstractmethod
    def read(self, targets: Mapping[str, CutTensor], group: dist.ProcessGroup | None = None) -> None:
        """Overwrite each target, of the size that is stored. Collective over ``group``; None: this process alone."""

    def read_whole(self, name: str) -> Tensor:
        """One tensor, in one piece on the host."""
        tensor = torch.empty(self.sizes[name], dtype=self.dtypes[name])
        self.read({name: CutTensor.whole(tensor)})
        return tensor


def open_tensors(root: Path) -> TensorFiles:
    """The tensors of a checkpoint or an export."""
    return Consolidated(root / CONSOLIDATED) if (root / CONSOLIDATED).is_file() else CutByRanks(root / TENSORS)


def read_description(root: Path) -> dict[str, Any]:
    """What a checkpoint or an export tells of its run."""
    name = "config.json" if (root / CONSOLIDATED).is_file() else "progress.json"
    told: dict[str, Any] = json.loads((root / name).read_text(encoding="utf-8"))
    return told


class CutByRanks(TensorFiles):
    """The files of torch.distributed.checkpoint."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        stored = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
        tensors = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
        self.sizes = {name: entry.size for name, entry in tensors.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in tensors.items()}

    def read(self, targets: Mapping[str, CutTensor], group: dist.ProcessGroup | None = None) -> None:
        """See TensorFiles."""
        reader = dcp.FileSystemReader(self.directory)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant to be without a group
            dcp.load(
                dict(targets), storage_reader=reader, planner=_Pieces(), process_group=group, no_dist=group is None
            )


class Consolidated(TensorFiles):
    """The safetensors file of an export."""

    def __init__(self, path: Path) -> None:
        self._tensors = safetensors_file.open_file(path)
        self.sizes = {name: tensor.size() for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, targets: Mapping[str, CutTensor], group: dist.ProcessGroup | None = None) -> None:
        """See TensorFiles. Each rank reads what it needs and waits for no one."""
        for name, target in targets.items():
            target.copy_from(self._tensors[name])


class _Pieces(DefaultLoadPlanner):
    """Loads a flat dict of CutTensors."""

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False) -> None:
        """See DefaultLoadPlanner, which knows no other values than torch's."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """See DefaultLoadPlanner."""
        assert self.metadata is not None
        return create_default_local_load_plan(self.state_dict, self.metadata)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """See DefaultLoadPlanner."""
        return cast(CutTensor, self.state_dict[index.fqn]).__get_tensor_shard__(index)

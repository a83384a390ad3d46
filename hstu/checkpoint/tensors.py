"""Tensors in a checkpoint or an export: their names, and how they are read.

``model.tables.<table>`` is a table and has states ``optimizer.tables.<table>.<state>``. ``model.<parameter>`` is any
other weight and has states ``optimizer.dense.<parameter>.<state>``.
"""

from __future__ import annotations

import json
import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan

from hstu.base.errors import DataError
from hstu.checkpoint.directory import DamagedCheckpoint, listed_files, verified_file
from hstu.parallel.shards import ShardedView

TENSORS = "tensors"
"""Directory of a checkpoint's tensors."""
CONSOLIDATED = "model.safetensors"
"""File of an export's tensors."""
EXPORT_VERSION = 1

WEIGHTS = "model."
TABLES = "model.tables."
IDS = "ids."
"""Raw ids of the rows of tables. They describe weights, but are none."""
DYNAMIC = "dynamic."
"""Ids and rows of dynamic tables in an export. A checkpoint has separate files for them."""
AVERAGE = "average"
"""The optimizer state that is also a weight: its moving average (OptimizerArgs.ema_decay)."""
STATES = "optimizer."
"""What the names of all optimizer states begin with."""
_DENSE_STATES = "optimizer.dense."
INDEX = ".metadata"
"""The file of the index of the tensors, which torch.distributed.checkpoint writes and reads as a pickle."""


def split_name(name: str) -> tuple[str, str]:
    """Return the weight that a tensor is or belongs to, and the name of its optimizer state ("" for the weight)."""
    if not name.startswith(STATES):
        return name, ""
    prefix = _DENSE_STATES if name.startswith(_DENSE_STATES) else STATES
    parameter, _, state = name.removeprefix(prefix).rpartition(".")
    return f"{WEIGHTS}{parameter}", state


def join_name(weight: str, state: str) -> str:
    """Invert ``split_name``."""
    if not state:
        return weight
    prefix = STATES if weight.startswith(TABLES) else _DENSE_STATES
    return f"{prefix}{weight.removeprefix(WEIGHTS)}.{state}"


class StoredTensors(ABC):
    """The tensors of a checkpoint or an export, for reading."""

    sizes: dict[str, torch.Size]
    """Name → size, for all tensors."""
    dtypes: dict[str, torch.dtype]
    """Name → dtype."""

    @abstractmethod
    def read(self, targets: Mapping[str, ShardedView], group: dist.ProcessGroup | None = None) -> None:
        """Overwrite each target, which has the stored size. Collective over ``group``; None: this process alone."""

    def read_whole(self, name: str) -> Tensor:
        """Return one whole tensor in host memory."""
        tensor = torch.empty(self.sizes[name], dtype=self.dtypes[name])
        self.read({name: ShardedView.whole(tensor)})
        return tensor


def open_tensors(root: Path) -> StoredTensors:
    """Open the tensors of a checkpoint or an export. Raises DamagedCheckpoint if their index is damaged."""
    if is_export(root):
        return ConsolidatedTensors(root / CONSOLIDATED)
    verified_file(root, f"{TENSORS}/{INDEX}")
    return ShardedTensors(root / TENSORS, [path.name for path in listed_files(root, f"{TENSORS}/*")])


def is_export(root: Path) -> bool:
    """Return whether a directory is an export; otherwise it is a checkpoint."""
    return bool(listed_files(root, CONSOLIDATED))


def read_metadata(root: Path) -> dict[str, Any]:
    """Return what a checkpoint (progress.json) or an export (config.json) says about its run.

    Raises DamagedCheckpoint, or DataError for an export of a newer version of this program.
    """
    path = verified_file(root, "config.json" if is_export(root) else "progress.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = int(content.get("version", EXPORT_VERSION))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}). Load another checkpoint.") from None
    if version > EXPORT_VERSION:
        raise DataError(
            f"{root} was exported by a newer version of this program: its version is {version}, and this program reads "
            f"versions up to {EXPORT_VERSION}. Update the program."
        )
    return dict(content)


def sizes_of_ranks(progress: Mapping[str, Any]) -> tuple[int, int, int]:
    """Ranks that have saved a checkpoint: of the world, of a tensor-parallel and of a context-parallel group."""
    return progress["world_size"], progress.get("tensor_parallel_size", 1), progress.get("context_parallel_size", 1)


class ShardedTensors(StoredTensors):
    """The files of torch.distributed.checkpoint, in which each rank has written its shards."""

    def __init__(self, directory: Path, listed: Collection[str]) -> None:
        self.directory, self._listed = directory, listed
        stored = IndexReader(directory, listed).read_metadata().state_dict_metadata
        tensors = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
        self.sizes = {name: entry.size for name, entry in tensors.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in tensors.items()}

    def read(self, targets: Mapping[str, ShardedView], group: dist.ProcessGroup | None = None) -> None:
        """See StoredTensors."""
        reader = IndexReader(self.directory, self._listed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # intended where there is no group
            dcp.load(
                dict(targets), storage_reader=reader, planner=_LoadPlanner(), process_group=group, no_dist=group is None
            )


class ConsolidatedTensors(StoredTensors):
    """The safetensors file of an export, in which every tensor is whole."""

    def __init__(self, path: Path) -> None:
        self._tensors = load_safetensors(path)
        self.sizes = {name: tensor.size() for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, targets: Mapping[str, ShardedView], group: dist.ProcessGroup | None = None) -> None:
        """See StoredTensors. Each rank reads what it needs, without a collective."""
        for name, target in targets.items():
            target.copy_from(self._tensors[name])


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file as private memory maps: writing to them does not change the file.

    Raises DataError if the file is damaged or is not a safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DataError(
            f"{path} is not a safetensors file, or it is damaged ({error}). Export the model again."
        ) from error


class _LoadPlanner(DefaultLoadPlanner):
    """Loads a flat dict of ShardedViews, a type that DefaultLoadPlanner does not handle."""

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        return create_default_local_load_plan(self.state_dict, self.metadata)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return cast(ShardedView, self.state_dict[index.fqn]).__get_tensor_shard__(index)


# --- the index of the tensors, ``tensors/.metadata``: a pickle, read without running what it may hold ----------------

_TYPES = {
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "torch": {"Size", *(f"float{bits}" for bits in (16, 32, 64)), "bfloat16", "bool", "uint8"}
    | {f"int{bits}" for bits in (8, 16, 32, 64)},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata",
    },
}  # fmt: skip
"""Module → names in it that an index may hold. None of them does anything when it is called."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib._local":  # Python 3.13 writes it; other versions have no such module
            module = "pathlib"
        if name not in _TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an index of tensors")
        return super().find_class(module, name)


class IndexReader(dcp.FileSystemReader):
    """The reader of torch.distributed.checkpoint, which does not run what an index may hold.

    ``listed``: names of the files, beside the index, that belong to the checkpoint.
    """

    def __init__(self, directory: Path, listed: Collection[str]) -> None:
        super().__init__(directory)
        self._listed = listed

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Read the index. Raises DamagedCheckpoint if it holds anything else than tensors in the listed files."""
        path = Path(self.path) / INDEX
        try:
            with path.open("rb") as file:
                index = _Unpickler(file).load()
            if not isinstance(index, Metadata):
                raise TypeError(f"it holds {type(index).__name__}")
            others = {info.relative_path for info in index.storage_data.values()} - set(self._listed)
            if others:
                raise ValueError(f"it refers to {sorted(map(str, others))[0]!r}, which is no file of the checkpoint")
            dict(index.state_dict_metadata)
        except OSError:
            raise
        except Exception as error:  # unpickling may raise anything
            raise DamagedCheckpoint(f"{path} is damaged ({error}). Load another checkpoint.") from None
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index

"""Names and reading of tensors in a checkpoint or an export.

A table is ``model.tables.<table>``, with states ``optimizer.tables.<table>.<state>``. Any other weight is
``model.<parameter>``, with states ``optimizer.dense.<parameter>.<state>``.
"""

import json
import pickle
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from hstu.base.errors import DataError
from hstu.base.json_shape import check_shape
from hstu.checkpoint.directory import DamagedCheckpoint, listed_files, verified_file
from hstu.parallel.shards import ShardedView

TENSORS = "tensors"
RANDOM_FILES = "rng_rank*.pt"
"""Files of the generators of each rank. What has none, an export for example, holds weights alone."""
CONSOLIDATED = "model.safetensors"
EXPORT_VERSION = 1

WEIGHTS = "model."
TABLES = "model.tables."
IDS = "ids."
"""Raw ids of table rows, which are stored with weights but are none."""
DYNAMIC = "dynamic."
"""Ids and rows of dynamic tables in an export. Checkpoints store them in separate files."""
AVERAGE = "average"
"""Optimizer state that is also a weight: the moving average (OptimizerArgs.ema_decay)."""
STATES = "optimizer."
_DENSE_STATES = "optimizer.dense."
_EXTREMES = {str: {str: {str: {"value": float | None, "iter": int, "number": int}}}}
_EVALUATION = {"iter": int, "epoch": float, "split": str, "metrics": {str: float | None}}
_LISTS = ("contextual", "side", "lists", "known_after", "numbers", "tower", "raw")
_FEATURES = {"item": str, "cardinalities": {str: int}, **{name: [str] for name in _LISTS}}
_OF_EXPORT: dict[Any, Any] = {
    "iteration": int,
    "tables?": {str: {"rows": int, "dim": int, "features": [str]}},
    "features?": _FEATURES | {"number_widths": [int], "action": str | None},
    "trained_on?": {"users": int, "events": int, "state?": str, "segments?": int, "samples?": int},
    "versions?": {str: str},
}
_OF_CHECKPOINT = _OF_EXPORT | {
    "position": {"epoch": int, "consumed": int},
    "phase?": {"first_iteration": int, "first_epoch": int, "first_segment": int},
    "optimizer": {"table_steps": int, "lr_multiplier": float},
    "carried?": {"history?": {"last": [_EVALUATION], "count": {str: int}, "extremes": _EXTREMES}},
    "world_size": int,
}
"""Shapes of config.json of an export and of progress.json of a checkpoint."""
INDEX = ".metadata"
"""Index of the tensors: a pickle of torch.distributed.checkpoint."""


def split_name(name: str) -> tuple[str, str]:
    """Return the weight of a tensor, and the name of its optimizer state ("" for the weight itself)."""
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


def is_weight(name: str) -> bool:
    """Return whether a tensor is a weight or the moving average of one, which evaluations use."""
    return split_name(name)[1] in ("", AVERAGE)


class StoredTensors:
    """The tensors of a checkpoint, in files of torch.distributed.checkpoint with the shards of each rank, or the whole
    ones of an export, in a safetensors file. Raises DamagedCheckpoint if the index of a checkpoint is damaged."""

    def __init__(self, root: Path) -> None:
        self._reader, self._whole = None, dict[str, Tensor]()
        if is_export(root):
            self._whole = load_safetensors(root / CONSOLIDATED)
            found = {name: (tensor.size(), tensor.dtype) for name, tensor in self._whole.items()}
        else:
            verified_file(root, f"{TENSORS}/{INDEX}")
            self._reader = IndexReader(root / TENSORS, [path.name for path in listed_files(root, f"{TENSORS}/*")])
            stored = self._reader.read_metadata().state_dict_metadata.items()
            tensors = {name: entry for name, entry in stored if isinstance(entry, TensorStorageMetadata)}
            found = {name: (entry.size, entry.properties.dtype) for name, entry in tensors.items()}
        self.sizes = {name: size for name, (size, _) in found.items()}
        self.dtypes = {name: dtype for name, (_, dtype) in found.items()}

    def read(self, targets: Mapping[str, ShardedView], group: dist.ProcessGroup | None = None) -> None:
        """Overwrite the targets, which have the stored sizes. Collective over ``group``; None: only this process."""
        if self._reader is None:  # each rank reads its own part of the file
            for name, target in targets.items():
                target.copy_from(self._whole[name])
            return
        planner, alone = _LoadPlanner(flatten_state_dict=False), group is None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # intended without a group
            dcp.load(dict(targets), storage_reader=self._reader, planner=planner, process_group=group, no_dist=alone)

    def read_whole(self, name: str) -> Tensor:
        """Return one whole tensor in host memory."""
        tensor = torch.empty(self.sizes[name], dtype=self.dtypes[name])
        self.read({name: ShardedView.whole(tensor)})
        return tensor


def is_export(root: Path) -> bool:
    """Return whether a directory is an export rather than a checkpoint."""
    return bool(listed_files(root, CONSOLIDATED))


def read_metadata(root: Path) -> dict[str, Any]:
    """Return progress.json of a checkpoint or config.json of an export. Raises DamagedCheckpoint or DataError."""
    exported = is_export(root)
    path = verified_file(root, "config.json" if exported else "progress.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = int(content.get("version", EXPORT_VERSION))
        if version <= EXPORT_VERSION:
            check_shape(content, _OF_EXPORT if exported else _OF_CHECKPOINT)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}). Load another checkpoint.") from None
    if version > EXPORT_VERSION:
        raise DataError(
            f"{root} was exported by a newer version of this program: its version is {version}, and this program reads "
            f"versions up to {EXPORT_VERSION}. Update the program."
        )
    return dict(content)


def sizes_of_ranks(progress: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the saving run's ranks: in the world, in a tensor-parallel and in a context-parallel group."""
    return progress["world_size"], progress.get("tensor_parallel_size", 1), progress.get("context_parallel_size", 1)


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a safetensors file into memory, copy-on-write. Raises DataError if the file is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DataError(
            f"{path} is not a safetensors file, or it is damaged ({error}). Export the model again."
        ) from error


class _LoadPlanner(DefaultLoadPlanner):
    """Loads a flat dict of ShardedViews, which DefaultLoadPlanner does not support."""

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return cast(ShardedView, self.state_dict[index.fqn]).__get_tensor_shard__(index)


# --- the index of the tensors, ``tensors/.metadata``: a pickle, read without running code in it ----------------------

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
"""Module → names in it that an index may contain. Calling them has no side effects."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib._local":  # written by Python 3.13; other versions have no such module
            module = "pathlib"
        if name not in _TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an index of tensors")
        return super().find_class(module, name)


class IndexReader(dcp.FileSystemReader):
    """Reader of torch.distributed.checkpoint that runs no code in the index. ``listed``: names of the other files."""

    def __init__(self, directory: Path, listed: Collection[str]) -> None:
        super().__init__(directory)
        self._listed = listed

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Read the index. Raises DamagedCheckpoint if it contains anything but tensors in the listed files."""
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

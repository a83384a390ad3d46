"""Reading the index of a checkpoint's tensors, ``tensors/.metadata``, without running what it may hold.

torch.distributed.checkpoint writes the index as a pickle and reads it with ``pickle.load``, which runs any function
that the file names.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from hstu.checkpoint.directory import DamagedCheckpoint

INDEX = ".metadata"
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


def read_index(file: BinaryIO, path: Path, listed: Collection[str]) -> Metadata:
    """Read an index.

    ``path``: for errors. ``listed``: names of the files, beside the index, that belong to the checkpoint. Raises
    DamagedCheckpoint if the index holds anything else than tensors in these files.
    """
    try:
        index = _Unpickler(file).load()
        if not isinstance(index, Metadata):
            raise TypeError(f"it holds {type(index).__name__}")
        others = {info.relative_path for info in index.storage_data.values()} - set(listed)
        dict(index.state_dict_metadata)
    except Exception as error:  # unpickling may raise anything
        raise DamagedCheckpoint(f"{path} is damaged ({error}). Load another checkpoint.") from None
    if others:
        raise DamagedCheckpoint(
            f"{path} refers to {sorted(map(str, others))[0]!r}, which is no file of the checkpoint. Load another one."
        )
    return index


class IndexReader(dcp.FileSystemReader):
    """The reader of torch.distributed.checkpoint, with ``read_index``. ``listed``: as there."""

    def __init__(self, directory: Path, listed: Collection[str]) -> None:
        super().__init__(directory)
        self._listed = listed

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Read the index."""
        path = Path(self.path) / INDEX
        with path.open("rb") as file:
            index = read_index(file, path, self._listed)
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index

"""The raw ids of table rows, and remapping of rows after the vocabulary has changed.

Preprocessing numbers the raw ids of a feature in ascending order: one new id shifts the rows of all larger ids.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from hstu.base.ids import codes_of
from hstu.checkpoint.tensors import IDS, StoredTensors
from hstu.data.store.sequence_store import SequenceStore, decode_strings

IdTensors = tuple[Tensor, ...]
"""Raw ids of a feature by code: (int64 [ids],), or for strings (offsets [ids + 1], UTF-8 bytes)."""


@dataclass(frozen=True)
class RawIds:
    """Feature → its raw ids."""

    features: Mapping[str, IdTensors] = field(default_factory=dict)

    @classmethod
    def from_store(cls, store: SequenceStore, features: Collection[str]) -> Self:
        """Read the raw ids of the features that are looked up by code, memory mapped."""
        named = [name for name in features if store.feature(name).has_vocab and not store.feature(name).raw]
        return cls({name: tuple(map(mapped_tensor, store.raw_id_arrays(name))) for name in named})

    @classmethod
    def from_stored(cls, tensors: StoredTensors, features: Collection[str]) -> Self:
        """Read the raw ids that a checkpoint holds for the features."""
        found = {}
        for feature in features:
            for names in _possible_names(feature):
                if set(names) <= tensors.sizes.keys():
                    found[feature] = tuple(tensors.read_whole(name) for name in names)
        return cls(found)

    def decoded(self, feature: str) -> np.ndarray | None:
        """Return the raw ids of a feature, ascending, as int64 or str objects; None if unknown."""
        arrays = self.features.get(feature)
        return None if arrays is None else _decode(arrays)

    def count(self, feature: str) -> int:
        """Return the number of ids of a feature; 0 if unknown."""
        arrays = self.features.get(feature, ())
        return len(arrays[0]) - (len(arrays) - 1) if arrays else 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store: ``ids.<feature>``, or ``ids.<feature>.offsets`` and ``….utf8``."""
        return {
            name: tensor
            for feature, arrays in self.features.items()
            for name, tensor in zip(_possible_names(feature)[len(arrays) - 1], arrays, strict=True)
        }


def _possible_names(feature: str) -> tuple[list[str], list[str]]:
    """Return the names of a feature's tensors for integer ids, and for string ids."""
    return [f"{IDS}{feature}"], [f"{IDS}{feature}.offsets", f"{IDS}{feature}.utf8"]


@dataclass(frozen=True)
class RowRemap:
    """Maps a table's rows to rows of a checkpoint with another vocabulary."""

    source_rows: np.ndarray | None
    """int64 [rows]: row of the checkpoint with the same raw id, or -1. None: unknown."""
    num_ids: int = 0
    """Ids of this run; later rows are spare."""

    @property
    def new_ids(self) -> int:
        """Number of ids that the checkpoint lacks."""
        return 0 if self.source_rows is None else int((self.source_rows[: self.num_ids] < 0).sum())

    def __str__(self) -> str:
        if self.source_rows is None:
            return "as initialised: it is unknown which row belonged to which id"
        found = int((self.source_rows >= 0).sum())
        return f"{found} of {len(self.source_rows)} rows read, by raw id, the others as initialised"


def remap_rows(rows: int, own: Sequence[IdTensors | None], stored: Sequence[IdTensors | None]) -> RowRemap | None:
    """Find the rows of a table in a checkpoint by raw id. Returns None if all rows have the same index there.

    ``rows``: row count in this run; ``own``, ``stored``: raw ids of its features in the run and in the checkpoint.
    Unknown raw ids count as equal, because codes of features without a vocabulary are their raw values.
    """
    known = [(left, right) for left, right in zip(own, stored, strict=True) if left is not None and right is not None]
    if all(len(left) == len(right) and all(map(torch.equal, left, right)) for left, right in known):
        return None
    ids, stored_ids = (_decode(side) for side in known[0])
    if len(own) > 1 or len(ids) > rows or ids.dtype != stored_ids.dtype or not len(stored_ids):
        return RowRemap(None)  # several features share the rows, or ids are hashed into them
    return RowRemap(np.concatenate([codes_of(ids, stored_ids), np.full(rows - len(ids), -1)]), len(ids))


def mapped_tensor(array: np.ndarray) -> Tensor:
    """A tensor with the memory of an array that nobody writes to, such as a memory map of a store."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that memory maps are read-only
        return torch.from_numpy(np.asarray(array))


def _decode(tensors: IdTensors) -> np.ndarray:
    arrays = [tensor.numpy() for tensor in tensors]
    return arrays[0] if len(arrays) == 1 else decode_strings(*arrays)

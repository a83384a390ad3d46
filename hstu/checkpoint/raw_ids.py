"""The raw id of each row of a table, and how rows are found again after the vocabulary has changed.

Preprocessing numbers the raw ids of a feature in ascending order: one new id shifts the rows of all ids after it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hstu.base.ids import codes_of
from hstu.checkpoint.tensors import IDS, StoredTensors
from hstu.data.store.sequence_store import SequenceStore, decode_strings

IdTensors = tuple[Tensor, ...]
"""Raw ids of a feature in the order of their codes: (int64 [ids],), or (offsets [ids + 1], UTF-8 bytes) of strings."""


@dataclass(frozen=True)
class RawIds:
    """Feature → its raw ids."""

    features: Mapping[str, IdTensors] = field(default_factory=dict)

    @classmethod
    def from_store(cls, store: SequenceStore, features: Collection[str]) -> RawIds:
        """Return the raw ids of those features that are looked up by code, memory mapped."""
        named = [name for name in features if store.feature(name).has_vocab and not store.feature(name).raw]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the memory maps are read-only
            return cls({name: tuple(map(torch.from_numpy, store.raw_id_arrays(name))) for name in named})

    @classmethod
    def from_stored(cls, tensors: StoredTensors, features: Collection[str]) -> RawIds:
        """Return the raw ids of those features for which a checkpoint holds them."""
        found = {}
        for feature in features:
            for names in _possible_names(feature):
                if set(names) <= tensors.sizes.keys():
                    found[feature] = tuple(tensors.read_whole(name) for name in names)
        return cls(found)

    def of(self, features: Sequence[str]) -> list[IdTensors | None]:
        """Return the raw ids of each feature; None where they are not known."""
        return [self.features.get(name) for name in features]

    def decoded(self, feature: str) -> np.ndarray | None:
        """Return the raw ids of a feature, ascending, int64 or str objects; None if they are not known."""
        arrays = self.features.get(feature)
        return None if arrays is None else _decode(arrays)

    def count(self, feature: str) -> int:
        """Return the number of ids of a feature; 0 if they are not known."""
        arrays = self.features.get(feature, ())
        return len(arrays[0]) - (len(arrays) - 1) if arrays else 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint: ``ids.<feature>``, or ``ids.<feature>.offsets`` and ``….utf8``."""
        return {
            name: tensor
            for feature, arrays in self.features.items()
            for name, tensor in zip(_possible_names(feature)[len(arrays) - 1], arrays, strict=True)
        }


def _possible_names(feature: str) -> tuple[list[str], list[str]]:
    """Return the names of a feature's tensors if its raw ids are numbers, and if they are strings."""
    return [f"{IDS}{feature}"], [f"{IDS}{feature}.offsets", f"{IDS}{feature}.utf8"]


@dataclass(frozen=True)
class RowRemap:
    """Where a run finds the rows of a table in a checkpoint that has another vocabulary."""

    source_rows: np.ndarray | None
    """int64 [rows]: the row of the checkpoint with the same raw id, -1 if there is none. None: it is unknown."""
    num_ids: int = 0
    """Ids of this run; later rows are spare."""

    @property
    def new_ids(self) -> int:
        """How many ids of this run the checkpoint does not have."""
        return 0 if self.source_rows is None else int((self.source_rows[: self.num_ids] < 0).sum())

    def __str__(self) -> str:
        if self.source_rows is None:
            return "as initialised: it is unknown which row belonged to which id"
        found = int((self.source_rows >= 0).sum())
        return f"{found} of {len(self.source_rows)} rows read, by raw id, the others as initialised"


def remap_rows(rows: int, own: Sequence[IdTensors | None], stored: Sequence[IdTensors | None]) -> RowRemap | None:
    """Find the rows of a table in a checkpoint by raw id.

    ``rows``: of the table in this run; ``own`` and ``stored``: raw ids of its features in this run and in the
    checkpoint. Returns None if every row is where it was. That is also assumed if raw ids are unknown on one side: the
    codes of features without a vocabulary are their raw values.
    """
    known = [(left, right) for left, right in zip(own, stored, strict=True) if left is not None and right is not None]
    if all(_same(left, right) for left, right in known):
        return None
    ids, stored_ids = (_decode(side) for side in known[0])
    if len(own) > 1 or len(ids) > rows or ids.dtype != stored_ids.dtype or not len(stored_ids):
        return RowRemap(None)  # several features share the rows, or ids are hashed into them
    return RowRemap(np.concatenate([codes_of(ids, stored_ids), np.full(rows - len(ids), -1)]), len(ids))


def _same(left: IdTensors, right: IdTensors) -> bool:
    return len(left) == len(right) and all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def _decode(tensors: IdTensors) -> np.ndarray:
    arrays = [tensor.numpy() for tensor in tensors]
    return arrays[0] if len(arrays) == 1 else decode_strings(*arrays)

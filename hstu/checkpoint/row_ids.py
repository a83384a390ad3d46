"""Which raw id each row of a table is of, so that rows can be told from one another when a vocabulary has changed.

Preprocessing numbers the ids of a feature anew, in their order: one more id moves all that follow.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hstu.checkpoint.names import IDS
from hstu.checkpoint.tensor_files import TensorFiles
from hstu.data.store import SequenceStore, decode_strings


@dataclass(frozen=True)
class RowIds:
    """Feature → its raw ids in the order of their codes: int64 [ids], or offsets [ids + 1] into UTF-8 bytes."""

    features: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, store: SequenceStore, features: Collection[str]) -> RowIds:
        """Those of the features that have a vocabulary; memory mapped."""
        named = [name for name in features if store.features[name].has_vocab]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would like to write into the store
            return cls({name: tuple(map(torch.from_numpy, store.raw_id_arrays(name))) for name in named})

    @classmethod
    def from_files(cls, files: TensorFiles, features: Collection[str]) -> RowIds:
        """Those of the features that a checkpoint knows."""
        found = {}
        for feature in features:
            names = next((names for names in _either_names(feature) if set(names) <= files.sizes.keys()), [])
            if names:
                found[feature] = tuple(files.read_whole(name) for name in names)
        return cls(found)

    def listed(self, features: Sequence[str]) -> list[tuple[Tensor, ...] | None]:
        """Those of each feature, None where there are none."""
        return [self.features.get(name) for name in features]

    def count(self, feature: str) -> int:
        """Ids of a feature; 0 where they are not known."""
        arrays = self.features.get(feature, ())
        return len(arrays[0]) - (len(arrays) - 1) if arrays else 0

    def tensors(self) -> dict[str, Tensor]:
        """As a checkpoint has them: ``ids.<feature>``, or ``ids.<feature>.offsets`` and ``ids.<feature>.utf8``."""
        return {
            name: tensor
            for feature, arrays in self.features.items()
            for name, tensor in zip(_either_names(feature)[len(arrays) - 1], arrays, strict=True)
        }


def _either_names(feature: str) -> tuple[list[str], list[str]]:
    """Names of a feature's tensors where its ids are numbers, and where they are strings."""
    return [f"{IDS}{feature}"], [f"{IDS}{feature}.offsets", f"{IDS}{feature}.utf8"]


def raw_ids_of(files: TensorFiles, features: Sequence[str]) -> np.ndarray | None:
    """Code → raw id, ascending, int64 or str objects, of the features that share a table.

    None where a checkpoint does not know them, or where a code is not the same id in all of the features.
    """
    listed = RowIds.from_files(files, features).listed(features)
    known = [arrays for arrays in listed if arrays is not None]
    if not known or len(known) < len(listed) or not all(_same(known[0], other) for other in known):
        return None
    return _decoded(known[0])


@dataclass(frozen=True)
class MovedRows:
    """Where the rows of a table lie in the checkpoint, whose ids are others."""

    places: np.ndarray | None
    """int64 [rows]: the row of the checkpoint that has the same id, -1 where there is none. None: it cannot be told."""

    def __str__(self) -> str:
        if self.places is None:
            return "as initialised: which row was whose cannot be told"
        return f"{int((self.places >= 0).sum())} of {len(self.places)} rows read, by raw id, the others as initialised"


def moved_rows(
    rows: int, own: Sequence[tuple[Tensor, ...] | None], stored: Sequence[tuple[Tensor, ...] | None]
) -> MovedRows | None:
    """How the rows of a table are found by the ids of the features that it serves; None: they lie where they did.

    So they do where the ids are the same, or not known on one side: features without a vocabulary have their raw
    values as codes.
    """
    known = [(left, right) for left, right in zip(own, stored, strict=True) if left is not None and right is not None]
    if all(_same(left, right) for left, right in known):
        return None
    ids, former = (_decoded(side) for side in known[0])
    if len(own) > 1 or len(ids) > rows or ids.dtype != former.dtype or not len(former):
        return MovedRows(None)  # several features share the rows, or ids are hashed into them
    places = np.minimum(np.searchsorted(former, ids), len(former) - 1)
    places = np.where(former[places] == ids, places, -1)
    return MovedRows(np.concatenate([places, np.full(rows - len(ids), -1)]).astype(np.int64))


def _same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return len(left) == len(right) and all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def _decoded(arrays: tuple[Tensor, ...]) -> np.ndarray:
    ids = [array.numpy() for array in arrays]
    return ids[0] if len(ids) == 1 else decode_strings(*ids)

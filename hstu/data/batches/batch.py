"""HSTUBatch: sequences of users with their labels, from the collator to the model."""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from hstu.data.sampling.sampler import SamplerPosition

NEGATIVES = "__negatives__"
"""Key of the extra item ids (negatives from the corpus) that are looked up in the item table."""
POOL = "__pool__"
"""Key under which a micro-batch gets the embeddings of ``pool_ids``."""
"""The features of an item tower have keys of their own for both: ``of_negatives`` and ``of_pool``."""
PADDING_ID = int(np.iinfo(np.int64).min)
"""Id of what only pads a pool of items. All other int64 may be ids, negative ones included."""


def of_negatives(feature: str) -> str:
    """Key of the values that the NEGATIVES have of a feature."""
    return f"{NEGATIVES}.{feature}"


def of_pool(feature: str) -> str:
    """Key of the rows that a micro-batch gets for the values that the items of ``pool_ids`` have of a feature."""
    return f"{POOL}.{feature}"


def is_of_negatives(key: str) -> bool:
    """Whether a key is NEGATIVES, or that of a feature of theirs."""
    return key == NEGATIVES or key.startswith(of_negatives(""))


def is_of_pool(key: str) -> bool:
    """Whether a key is POOL, or that of a feature of its items."""
    return key == POOL or key.startswith(of_pool(""))


@dataclass(frozen=True)
class ItemFeatures:
    """Values of some features of n items."""

    values: Mapping[str, np.ndarray]
    """Feature → int64 [n]; of a list the values of one item after another."""
    list_lengths: Mapping[str, np.ndarray]
    """List → int64 [n], values of each item."""


def _per(axis: str, dim: int = 0, **options: Any) -> Any:
    """A field whose dimension ``dim`` has an element per "sequence", "item", "label", "draw" or "seen" id."""
    return field(metadata={"axis": axis, "dim": dim}, **options)


class TensorGroup(Pipelineable):
    """Base of dataclasses that move between devices: it maps tensors, jagged tensors and other groups in the fields."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """With all tensors on ``device``. Host arrays are shared, not copied."""
        return self._map(lambda part: part.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """In pinned host memory."""
        return self._map(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of all tensors allocated until the work that is now queued on ``stream`` is done."""
        for part in self._parts().values():
            part.record_stream(stream)

    def _parts(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: v for name, v in fields.items() if isinstance(v, (Tensor, KeyedJaggedTensor, TensorGroup))}

    def _map(self, function: Callable[[Any], Any]) -> Self:
        parts = {name: function(part) for name, part in self._parts().items()}
        return dataclasses.replace(self, **parts)


@dataclass(kw_only=True)
class ItemColumns(TensorGroup):
    """What a batch has of each item beside ids, items of one sequence after another; T = sum of item_lengths."""

    timestamps: Tensor | None = _per("item", default=None)
    """int64 [T], in seconds: times of the items, if the model has a relative bias."""
    numbers: Tensor | None = _per("item", default=None)
    """float32 [T, W]: the numbers and vectors of each item, in the order of FeatureRoles.numbers; NaN where one is
    missing. None if there are none."""
    list_lengths: Tensor | None = _per("item", dim=1, default=None)
    """int64 [L, T]: the number of values that each item has of each of the L side features that are lists. None if
    L = 0."""


@dataclass(kw_only=True)
class BatchNegatives(TensorGroup):
    """What the labels of a batch are compared with, beside the NEGATIVES among its features. Empty in evaluation."""

    draws: Tensor | None = _per("draw", default=None)
    """int32 [n, R] for the n labelled items that have an item before them (``labels_with_history``). From the corpus:
    indices into the NEGATIVES values. In-batch: random numbers in [0, 2^31)."""
    pool_positions: Tensor | None = None
    """int64 [S]. In-batch and mixed negatives: index into the item values of the first occurrence of each distinct
    item, in ascending order of the item ids."""
    pool_ids: Tensor | None = None
    """int64 [S]. Micro-batches have these instead of pool_positions: the distinct items of the whole batch,
    ascending."""
    pool_features: KeyedJaggedTensor | None = None
    """With an item tower, the values of its features that the items of pool_ids have: S runs for each feature."""
    list_lengths: Tensor | None = None
    """int64 [L, N]: the number of values that each of the N NEGATIVES has of each of the L features of an item tower
    that are lists. None if L = 0."""


@dataclass(kw_only=True)
class SeenIds(TensorGroup):
    """Items that the users of a batch have seen.

    Retrieval evaluation with filter_seen: the store's codes of all items of the users' histories. Training with
    mask_seen: ids of the items that the users had before the sequences begin.
    """

    values: Tensor = _per("seen")
    """int64 [.], possibly repeated."""
    lengths: Tensor = _per("sequence")
    """int64 [B]: how many of ``values`` each sequence has."""


@dataclass(kw_only=True)
class HSTUBatch(TensorGroup):
    """B sequences with M labelled items in total.

    A batch always has the configured number of sequences. Missing ones are *empty* sequences: every feature,
    contextual features included, has length 0, so they contribute nothing. The NumPy arrays and integers stay on the
    host, so a step reads no size from the device.
    """

    features: KeyedJaggedTensor
    """Keys in order: contextual features, item, action if any, side features, NEGATIVES if any and what an item tower
    reads of them. int64 values and lengths. All NEGATIVES belong to the first sequence. ``length_per_key`` is set, so
    splitting by key reads nothing from the device."""
    num_candidates: Tensor = _per("sequence")
    """int64 [B]: the newest items of each sequence that are candidates."""
    num_labels: Tensor = _per("sequence")
    """int64 [B]: the newest items of each sequence that are labelled."""
    labels: Tensor = _per("label")
    """int64 [M]. Ranking: actions of the labelled items. Retrieval: ids of the labelled items, which are the targets.
    Retrieval evaluation: the store's codes of the held-out items, int64 [B], -1 for padding."""
    label_values: Tensor | None = _per("label", dim=1, default=None)
    """float32 [L, M]: what RankingArgs.tasks read of the labelled items, a row for each of FeatureRoles.labels; NaN
    where a value is missing. None if L = 0."""
    user_ids: Tensor = _per("sequence")
    """int64 [B]: rows of the users in the store, -1 for padding."""
    request_times: Tensor | None = _per("sequence", default=None)
    """int64 [B], in seconds: when the recommendations are asked for, if DatasetArgs.query_time = "request"; 0 for
    padding. Only in retrieval evaluation of a model with a relative bias."""
    items: ItemColumns = field(default_factory=ItemColumns)
    """Times, numbers and lists of the items."""
    negatives: BatchNegatives = field(default_factory=BatchNegatives)
    """Of the retrieval loss."""
    seen: SeenIds | None = None
    """None where nothing is removed from the corpus or from the negatives."""
    real_batch_size: int
    """Number of sequences that are not padding. They come first."""
    item_lengths: np.ndarray = _per("sequence")
    """int64 [B], on the host: items of each sequence, candidates included."""
    num_candidates_host: np.ndarray = _per("sequence")
    """int64 [B], on the host: the values of num_candidates."""
    num_labels_host: np.ndarray = _per("sequence")
    """int64 [B], on the host: the values of num_labels."""
    position: SamplerPosition | None = None
    """Sampler position after this batch has been trained on. None for a batch made by hand."""

    @property
    def batch_size(self) -> int:
        """B, padding included."""
        return len(self.item_lengths)

    @property
    def num_labels_total(self) -> int:
        """M, from the host."""
        return int(self.num_labels_host.sum())


def labels_with_history(num_labels: np.ndarray, item_lengths: np.ndarray) -> np.ndarray:
    """How many of the newest ``num_labels`` items of each sequence follow another item; int64 [B] all three."""
    most: np.ndarray = np.minimum(num_labels, np.maximum(item_lengths - 1, 0))
    return most


def keyed_jagged(values: dict[str, np.ndarray], lengths: dict[str, np.ndarray]) -> KeyedJaggedTensor:
    """Build a KeyedJaggedTensor from host arrays.

    ``values``: per key, int64 [sum of lengths]. ``lengths``: per key, int64 [B].
    """
    return KeyedJaggedTensor(
        keys=list(values),
        values=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *values.values()])),
        lengths=torch.from_numpy(np.concatenate([lengths[key] for key in values])),
        stride=len(next(iter(lengths.values()))),
        length_per_key=[len(array) for array in values.values()],
    )


def packed(batch: HSTUBatch) -> bytes:
    """The pickle of a batch on the host; ``pickle.loads`` gives it back."""
    sink = io.BytesIO()
    _Pickler(sink, protocol=pickle.HIGHEST_PROTOCOL).dump(batch)
    return sink.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles a tensor as the array of its values: torch would write and read an archive for each."""

    def reducer_override(self, thing: Any) -> Any:
        return (torch.from_numpy, (thing.numpy(),)) if isinstance(thing, Tensor) else NotImplemented

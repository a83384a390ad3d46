"""HSTUBatch: sequences of users with their labels, from the collator to the model."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from hstu.data.sampling.sampler import SamplerPosition

NEGATIVES = "__negatives__"
"""Key of negatives from the corpus: further item ids that are looked up in the item table."""
POOL = "__pool__"
"""Key of the embeddings of ``pool_ids`` in a micro-batch."""
"""An item tower's features of both have their own keys: ``of_negatives`` and ``of_pool``."""
PADDING_ID = int(np.iinfo(np.int64).min)
"""Id of padding in a pool of items. All other int64 values, also negative ones, may be ids."""


def of_negatives(feature: str) -> str:
    """Key of a feature's values of the NEGATIVES."""
    return f"{NEGATIVES}.{feature}"


def of_pool(feature: str) -> str:
    """Key of the rows of a feature's values of the ``pool_ids``, in a micro-batch."""
    return f"{POOL}.{feature}"


def is_of_negatives(key: str) -> bool:
    """Whether a key is NEGATIVES or the key of one of their features."""
    return key == NEGATIVES or key.startswith(of_negatives(""))


@dataclass(frozen=True)
class ItemFeatures:
    """Values of some features of n items."""

    values: Mapping[str, np.ndarray]
    """Feature → int64 [n]; for a list feature, the values of one item after another."""
    list_lengths: Mapping[str, np.ndarray]
    """List feature → int64 [n], number of values per item."""


def _per(axis: str, dim: int = 0, **options: Any) -> Any:
    """A field whose dimension ``dim`` has one element per "sequence", "item", "label", "draw" or "seen" id."""
    return field(metadata={"axis": axis, "dim": dim}, **options)


class TensorGroup(Pipelineable):
    """Base of dataclasses whose tensors, jagged tensors and groups move between devices together."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Moves all tensors to ``device``. Host arrays are shared, not copied."""
        return self._map(lambda part: part.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copies all tensors to pinned host memory."""
        return self._map(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory of all tensors allocated until the work now queued on ``stream`` is done."""
        for part in self._parts().values():
            part.record_stream(stream)

    def _parts(self, *also: type) -> dict[str, Any]:
        kinds = (Tensor, KeyedJaggedTensor, TensorGroup, *also)
        return {name: part for name, part in vars(self).items() if isinstance(part, kinds)}

    def _map(self, function: Callable[[Any], Any], *also: type) -> Self:
        """The group with ``function(part)`` in the place of each part, in the order of the fields."""
        return dataclasses.replace(self, **{name: function(part) for name, part in self._parts(*also).items()})


Group = TypeVar("Group", bound=TensorGroup)


@dataclass(kw_only=True)
class ItemColumns(TensorGroup):
    """What a batch holds of each item beside its ids, sequence after sequence; T = sum of item_lengths."""

    timestamps: Tensor | None = _per("item", default=None)
    """int64 [T] seconds: times of the items. None without a relative bias."""
    numbers: Tensor | None = _per("item", default=None)
    """float32 [T, W]: numbers and vectors of each item in the order of FeatureRoles.numbers, NaN where missing."""
    list_lengths: Tensor | None = _per("item", dim=1, default=None)
    """int64 [L, T]: number of values that each item has of each of L list side features. None if L = 0."""


@dataclass(kw_only=True)
class BatchNegatives(TensorGroup):
    """What the labels of a batch are compared with, beside the NEGATIVES among its features. Empty in evaluation."""

    draws: Tensor | None = _per("draw", default=None)
    """int32 [n, R] for the n labels that have an item before them (``labels_with_history``): indices into the NEGATIVES
    values or, for in-batch negatives, random numbers in [0, 2^31)."""
    pool_positions: Tensor | None = None
    """int64 [S], for in-batch and mixed negatives: index into the item values of the first occurrence of each distinct
    item, in ascending order of the item ids."""
    pool_ids: Tensor | None = None
    """int64 [S], in micro-batches, in place of pool_positions: distinct items of the whole batch, ascending."""
    pool_features: KeyedJaggedTensor | None = None
    """With an item tower: its features' values of the items of pool_ids, S runs per feature."""
    largest_pool: Callable[[], int] | None = None
    """Returns the largest S of the data-parallel ranks. None: all have as many."""
    list_lengths: Tensor | None = None
    """int64 [L, N]: number of values that each of N NEGATIVES has of each of an item tower's L lists. None if L = 0."""


@dataclass(kw_only=True)
class SeenIds(TensorGroup):
    """Items that the users of a batch have seen: in evaluation (filter_seen) the store's codes of all items of their
    histories, in training (mask_seen) the ids of the items before the sequences."""

    values: Tensor = _per("seen")
    """int64 [.], possibly repeated."""
    lengths: Tensor = _per("sequence")
    """int64 [B]: number of ``values`` per sequence."""


@dataclass(kw_only=True)
class HSTUBatch(TensorGroup):
    """B sequences with M labelled items in total. A batch always has the configured number of sequences. Missing
    sequences are *empty*: every feature, also a contextual one, has length 0. NumPy arrays and integers stay on the
    host, so a step reads no size from the device."""

    features: KeyedJaggedTensor
    """Keys in order: contextual features, item, action if any, side features, NEGATIVES if any and their item tower
    features; int64 values and lengths. All NEGATIVES belong to the first sequence. ``length_per_key`` is set, so
    splitting by key reads nothing from the device."""
    num_candidates: Tensor = _per("sequence")
    """int64 [B]: number of candidates, which are the newest items of a sequence."""
    num_labels: Tensor = _per("sequence")
    """int64 [B]: number of labelled items, which are the newest items of a sequence."""
    labels: Tensor = _per("label")
    """int64 [M]: actions (ranking) or ids (retrieval) of the labelled items. In retrieval evaluation int64 [B], the
    store's codes of the held-out items, -1 for padding."""
    label_values: Tensor | None = _per("label", dim=1, default=None)
    """float32 [L, M]: values of the labelled items that RankingArgs.tasks read, in the order of FeatureRoles.labels;
    NaN where missing. None if L = 0."""
    user_ids: Tensor = _per("sequence")
    """int64 [B]: rows of the users in the store, -1 for padding."""
    request_times: Tensor | None = _per("sequence", default=None)
    """int64 [B] seconds: request times, 0 for padding. Only in evaluation of a model that reads them."""
    asks_for_next: Tensor | None = _per("sequence", default=None)
    """bool [B]: see build_layout. Only in training with DatasetArgs.query_time = "either"."""
    target_events: Tensor | None = _per("sequence", default=None)
    """int64 [B]: ``SampleTable.newest_labels`` in the store, 0 for padding. Only in evaluation."""
    items: ItemColumns = field(default_factory=ItemColumns)
    negatives: BatchNegatives = field(default_factory=BatchNegatives)
    seen: SeenIds | None = None
    """None if seen items stay in the corpus and among the negatives."""
    real_batch_size: int
    """Number of sequences that are not padding, which come first."""
    item_lengths: np.ndarray = _per("sequence")
    """int64 [B]: items per sequence, candidates included. This field and the next two stay on the host."""
    num_candidates_host: np.ndarray = _per("sequence")
    num_labels_host: np.ndarray = _per("sequence")
    position: SamplerPosition | None = None
    """Sampler position after training on this batch. None for a batch made by hand."""

    @property
    def batch_size(self) -> int:
        """B, padding included."""
        return len(self.item_lengths)

    @property
    def num_labels_total(self) -> int:
        """M, computed on the host."""
        return int(self.num_labels_host.sum())


def labels_with_history(num_labels: np.ndarray, item_lengths: np.ndarray) -> np.ndarray:
    """int64 [B]: how many of the newest ``num_labels`` items of each sequence follow another item."""
    return np.asarray(np.minimum(num_labels, np.maximum(item_lengths - 1, 0)))


def keyed_jagged(values: dict[str, np.ndarray], lengths: dict[str, np.ndarray]) -> KeyedJaggedTensor:
    """Builds a KeyedJaggedTensor from host arrays: per key int64 [sum of lengths] values and int64 [B] lengths."""
    return KeyedJaggedTensor(
        keys=list(values),
        values=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *values.values()])),
        lengths=torch.from_numpy(np.concatenate([lengths[key] for key in values])),
        stride=len(next(iter(lengths.values()))),
        length_per_key=[len(array) for array in values.values()],
    )


def packed(batch: HSTUBatch) -> tuple[np.ndarray, np.ndarray]:
    """A batch on the host as two arrays for ``unpacked``: n and the shapes of its arrays, as many int64 for every batch
    of a run; the numbers in these arrays, each from a multiple of 8 bytes on, int64 [n]."""
    arrays: list[np.ndarray] = []

    def collect(array: np.ndarray) -> np.ndarray:
        arrays.append(array)
        return array

    _replaced(batch, collect)
    padded = bytearray().join(array.tobytes() + bytes(-array.nbytes % 8) for array in arrays)
    sizes = [size for array in arrays for size in array.shape]
    return np.array([len(padded) // 8, *sizes]), np.frombuffer(padded, "i8")


def unpacked(like: HSTUBatch, shapes: np.ndarray, numbers: np.ndarray) -> HSTUBatch:
    """A batch of the same run as ``like`` from its ``packed`` arrays, whose memory it shares."""
    sizes, start = iter(shapes[1:].tolist()), 0

    def read(array: np.ndarray) -> np.ndarray:
        nonlocal start
        shape = [next(sizes) for _ in array.shape]
        found = np.frombuffer(numbers, array.dtype, math.prod(shape), start).reshape(shape)
        start += found.nbytes + -found.nbytes % 8
        return found

    return _replaced(like, read)


def _replaced(batch: HSTUBatch, new: Callable[[np.ndarray], np.ndarray]) -> HSTUBatch:
    """The batch with ``new(array)`` in the place of each array of numbers, in the order of the fields."""

    def of(part: Any) -> Any:
        if isinstance(part, TensorGroup):
            return part._map(of, np.ndarray, int)
        if isinstance(part, Tensor):
            return torch.from_numpy(new(part.numpy()))
        if isinstance(part, KeyedJaggedTensor):
            keys, values, lengths = part.keys(), of(part.values()), of(part.lengths())
            counts = lengths.view(len(keys), -1).sum(1).tolist()
            return KeyedJaggedTensor(keys, values, lengths=lengths, stride=part.stride(), length_per_key=counts)
        return new(part) if isinstance(part, np.ndarray) else int(new(np.array(part)))

    return batch._map(of, np.ndarray, int)

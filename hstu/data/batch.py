"""HSTUBatch: what a training step gets, on its way from the collator to the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from hstu.data.sampler import SamplerPosition

NEGATIVES = "__negatives__"
"""Key of the extra item ids (uniform and full negatives) that are looked up in the item table."""
POOL = "__pool__"
"""Key of the rows of ``pool_ids`` among the rows that a micro-batch is computed from."""


@dataclass(kw_only=True)
class HSTUBatch(Pipelineable):
    """B sequences of one rank, with M labelled items in all.

    A batch always has the configured number of sequences: what is missing is filled with *empty* sequences, whose
    every feature, context too, has length 0, so that they add nothing anywhere. The NumPy arrays and integers stay
    on the host, so that no step needs to ask the device for a size.
    """

    features: KeyedJaggedTensor
    """Keys in order: contextual features, item, action if any, NEGATIVES if any. int64 values and lengths. All
    NEGATIVES stand in the slot of the first sequence. ``length_per_key`` is set, so splitting by key needs no sync."""
    num_candidates: Tensor
    """int64 [B]: the newest items of each sequence that are candidates."""
    num_labels: Tensor
    """int64 [B]: the newest items of each sequence that are labelled."""
    labels: Tensor
    """int64 [M]. Ranking: actions of the labelled items; retrieval: the ids of the labelled items, which are the
    targets. Retrieval evaluation: the store's codes of the held-out items, int64 [B], -1 for padding."""
    user_ids: Tensor
    """int64 [B]: rows of the users in the store, -1 for padding."""
    timestamps: Tensor | None = None
    """int64 [sum of item_lengths], seconds: times of the items, where relative biases ask for them."""
    draws: Tensor | None = None
    """int32 [M, R]. uniform negatives: indices into the NEGATIVES values; in_batch: random numbers in [0, 2^31)."""
    pool_positions: Tensor | None = None
    """int64 [S]. in_batch negatives: where, in the item values, each distinct item of this batch first occurs;
    in ascending order of the items' ids."""
    pool_ids: Tensor | None = None
    """int64 [S]. Micro-batches, in place of pool_positions: the distinct items of the whole batch, ascending."""
    seen_values: Tensor | None = None
    """int64 [.]. Retrieval evaluation with filter_seen: the store's codes of the items of the users' whole histories,
    repeats possible."""
    seen_offsets: Tensor | None = None
    """int64 [B + 1]: each sequence's range in seen_values."""
    real_batch_size: int
    """Sequences that are not padding; they come first."""
    item_lengths: np.ndarray
    """int64 [B], host: items of each sequence, candidates included."""
    num_candidates_host: np.ndarray
    """int64 [B], host: num_candidates."""
    num_labels_total: int
    """M, host."""
    position: SamplerPosition | None = None
    """Where the run stands once this batch has been trained on; None for a batch made by hand."""
    group: GroupBatch | None = None
    """Under tensor parallelism: what the dense part computes on, together with the ranks of its group."""
    micro: tuple[MicroBatch, ...] = ()
    """Where gradients are accumulated: the parts that the dense part computes on, one after the other."""

    @property
    def computed(self) -> HSTUBatch:
        """What the dense part computes on: the batch of the group where there is one, else this one."""
        return self if self.group is None else self.group.batch

    @property
    def batch_size(self) -> int:
        """B, padding included."""
        return len(self.item_lengths)

    @property
    def num_item_tokens(self) -> int:
        """Items of all sequences, candidates included."""
        return int(self.item_lengths.sum())

    @property
    def num_candidates_total(self) -> int:
        """Candidates of all sequences."""
        return int(self.num_candidates_host.sum())

    @property
    def max_item_length(self) -> int:
        """Items of the longest sequence."""
        return int(self.item_lengths.max(initial=0))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.labels.device

    def to(self, device: torch.device, non_blocking: bool = False) -> HSTUBatch:
        """This batch with all tensors on ``device``; host arrays are shared."""
        return self._map(lambda part: part.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> HSTUBatch:
        """This batch in page-locked host memory."""
        return self._map(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors, too."""
        for part in (*self._parts().values(), *self.micro):
            part.record_stream(stream)

    def _parts(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        movable = (Tensor, KeyedJaggedTensor, GroupBatch)
        return {name: value for name, value in fields.items() if isinstance(value, movable)}

    def _map(self, function: Callable[[Any], Any]) -> HSTUBatch:
        moved = {name: function(part) for name, part in self._parts().items()}
        return dataclasses.replace(self, **moved, micro=tuple(function(part) for part in self.micro))


@dataclass(kw_only=True)
class GroupBatch:
    """The batches of a tensor-parallel group's ranks as one, equal on all of them, and a rank's part of it."""

    batch: HSTUBatch
    """The real sequences of the group, rank after rank, then the padding. What only an evaluator reads of a rank's own
    batch (seen_values, position) is left out."""
    num_values: dict[str, list[int]]
    """Feature → how many of its values come from each rank. Shared NEGATIVES, equal on all ranks, are not here: they
    stand once in ``batch``, and each rank looks all of them up."""
    sequences: slice
    """This rank's real sequences."""
    labels: slice
    """This rank's labelled items, of the M of ``batch``."""

    def to(self, device: torch.device, non_blocking: bool = False) -> GroupBatch:
        """See HSTUBatch."""
        return dataclasses.replace(self, batch=self.batch.to(device, non_blocking))

    def pin_memory(self) -> GroupBatch:
        """See HSTUBatch."""
        return dataclasses.replace(self, batch=self.batch.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """See HSTUBatch."""
        self.batch.record_stream(stream)


@dataclass(kw_only=True)
class MicroBatch:
    """A run of the sequences of a batch, which the dense part computes by themselves."""

    batch: HSTUBatch
    rows: dict[str, slice]
    """Feature → where its values stand among those of the whole batch. NEGATIVES are all of them in every part."""

    def to(self, device: torch.device, non_blocking: bool = False) -> MicroBatch:
        """See HSTUBatch."""
        return dataclasses.replace(self, batch=self.batch.to(device, non_blocking))

    def pin_memory(self) -> MicroBatch:
        """See HSTUBatch."""
        return dataclasses.replace(self, batch=self.batch.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """See HSTUBatch."""
        self.batch.record_stream(stream)


def keyed_jagged(values: dict[str, np.ndarray], lengths: dict[str, np.ndarray]) -> KeyedJaggedTensor:
    """A KeyedJaggedTensor of host arrays: flat ``values`` int64 [sum of lengths] and ``lengths`` int64 [B] a key."""
    return KeyedJaggedTensor(
        keys=list(values),
        values=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *values.values()])),
        lengths=torch.from_numpy(np.concatenate([lengths[key] for key in values])),
        stride=len(next(iter(lengths.values()))),
        length_per_key=[len(array) for array in values.values()],
    )

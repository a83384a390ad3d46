"""Which row ("slot") of a table's shard holds which id: the specification of every implementation, bit for bit.

A shard has ``capacity`` slots, and any id may get any slot. A batch is a multiset of ids: their order and position in
it do not matter. ``assign`` at step t does the following:

1. An id that has a slot gets its occurrences added to its count, and t as its last step.
2. An id without a slot gets none while it has been sighted fewer than ``admission_threshold`` times, this batch
   included.
3. The other ids get unused slots. When these run out, they compete with the ids that have a slot and do not occur in
   this batch: the highest scores win.

The new ids that win take over the slots of the lowest scores. Under lru every new id scores higher than any id outside
the batch. Under lfu an id that occurs once does not evict an id that was seen twice.

Which of these slots gets which of the new ids is left to the implementation, and depends only on the batches. The CPU
and the reference hand out the slot of the lowest score first, the GPU that of the lowest number.

Scores are int64. Equal scores are ordered by the hash of their ids (hstu.base.hashing.splitmix64); the lower one goes.

    lru    last step · 2^31 + count       evicts the least recently seen id, of several the least often seen
    lfu    count · 2^32 + last step       evicts the least often seen id, of several the least recently seen
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Literal

from torch import Tensor

from hstu.parallel.dynamic.hashing import in_unsigned_order, mix

Policy = Literal["lru", "lfu"]
MAX_COUNT = 2**31 - 1
"""Counts saturate here."""
MAX_STEP = 2**32 - 1
NO_SLOT = -1


@dataclass
class Counters:
    """What happened to the ids of training batches. The first four count every occurrence of a repeated id."""

    lookups: int = 0
    hits: int = 0
    """Lookups of ids that had a row before the batch."""
    waiting: int = 0
    """Lookups of ids that admission_threshold still keeps out."""
    rejections: int = 0
    """Lookups of ids without room: all rows belonged to the same batch or (lfu) to ids seen more often."""
    insertions: int = 0
    evictions: int = 0


_INSERTIONS = [field.name for field in fields(Counters)].index("insertions")


@dataclass(frozen=True)
class Assignment:
    """The result of ``assign`` for a batch of n ids. All tensors are int64.

    On a GPU the host does not know how many ids are new: ``new_slots`` and ``new_ids`` are as long as there may be, and
    their first ``insertions`` entries are set; of ``evicted_ids`` the first ``evictions``. Elsewhere they have no more.
    """

    slots: Tensor
    """[n]: the slot of each id, or NO_SLOT."""
    new_slots: Tensor
    """Slots that this batch gave to an id; their rows must be initialised."""
    new_ids: Tensor
    """The ids that got them."""
    evicted_ids: Tensor
    """Ids that lost their slot."""
    counts: Tensor
    """[6]: what happened, in the order of the fields of Counters."""

    @property
    def insertions(self) -> Tensor:
        """[1]: how many ids got a slot."""
        return self.counts[_INSERTIONS : _INSERTIONS + 1]

    @property
    def counters(self) -> Counters:
        """What happened; waits for the device."""
        return Counters(*self.counts.tolist())

    def trimmed(self) -> Assignment:
        """The same without entries that are not set; waits for the device."""
        counters = self.counters
        new, evicted = counters.insertions, counters.evictions
        return replace(
            self, new_slots=self.new_slots[:new], new_ids=self.new_ids[:new], evicted_ids=self.evicted_ids[:evicted]
        )


class SlotTable(ABC):
    """Ids, scores and slots of one shard.

    With ``admission_threshold`` > 1 a second SlotTable of the same capacity, under lru, counts the sightings of ids
    without a slot. An id that it evicts starts again from zero.
    """

    sightings: SlotTable | None = None

    def __init__(self, capacity: int, policy: Policy, admission_threshold: int = 0) -> None:
        self.capacity = capacity
        self.policy = policy
        self.admission_threshold = admission_threshold

    @abstractmethod
    def size(self) -> Tensor:
        """Slots in use: int64 [1], on the device of the table."""

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """Slots of ``ids``, int64 [n]; NO_SLOT for an id without one. Changes nothing."""

    @abstractmethod
    def assign(self, ids: Tensor, step: int) -> Assignment:
        """Give slots to a training batch. ``step`` starts at 1 or above and grows with every call."""

    @abstractmethod
    def content(self) -> tuple[Tensor, Tensor]:
        """(ids, scores) of the slots in use, by slot: the state, from which all else follows."""

    @abstractmethod
    def restore(self, ids: Tensor, scores: Tensor) -> None:
        """Replace the content by at most ``capacity`` ids with their ``scores``, in slots 0, 1, …"""


def score(policy: Policy, counts: Tensor, step: int | Tensor) -> Tensor:
    """Scores of ids that were seen ``counts`` times, and last at ``step``."""
    counts = counts.clamp(max=MAX_COUNT)
    return (step << 31) + counts if policy == "lru" else (counts << 32) + step


def counts_of(policy: Policy, scores: Tensor) -> Tensor:
    """How often the ids of these scores were seen."""
    return scores & MAX_COUNT if policy == "lru" else scores >> 32


def steps_of(policy: Policy, scores: Tensor) -> Tensor:
    """The step at which the ids of these scores were last seen."""
    return scores >> 31 if policy == "lru" else scores & MAX_STEP


def eviction_order(scores: Tensor, ids: Tensor) -> Tensor:
    """Indices of ids in the order in which they are evicted: by ascending score, equal scores by hash."""
    by_hash = in_unsigned_order(mix(ids)).argsort()
    return by_hash[scores[by_hash].argsort(stable=True)]

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

Scores are int64. Equal scores are ordered by the hash of their ids (hstu.data.hashing.splitmix64); the lower one goes.

    lru    last step · 2^31 + count       evicts the least recently seen id, of several the least often seen
    lfu    count · 2^32 + last step       evicts the least often seen id, of several the least recently seen
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Literal

import torch
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

    def add(self, other: Counters) -> None:
        """Add ``other``, counter by counter."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True)
class Assignment:
    """The result of ``assign`` for a batch of n ids. All tensors are int64."""

    slots: Tensor
    """[n]: the slot of each id, or NO_SLOT."""
    new_slots: Tensor
    """[k]: slots that this batch gave to an id; their rows must be initialised."""
    new_ids: Tensor
    """[k]: the ids that got them."""
    evicted_ids: Tensor
    """[v]: ids that lost their slot."""
    counters: Counters


class SlotTable(ABC):
    """Ids, scores and slots of one shard.

    ``ids`` and ``scores``, int64 [capacity], are the state; their first ``size`` entries are in use. All else that an
    implementation keeps follows from them. With ``admission_threshold`` > 1 a second SlotTable of the same capacity,
    under lru, counts the sightings of ids without a slot. An id that it evicts starts again from zero.
    """

    def __init__(self, capacity: int, policy: Policy, admission_threshold: int = 0, device: str = "cpu") -> None:
        self.capacity = capacity
        self.policy = policy
        self.admission_threshold = admission_threshold
        self.ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.scores = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.size = 0
        self.sightings = self._like(capacity, "lru") if admission_threshold > 1 else None

    @abstractmethod
    def _like(self, capacity: int, policy: Policy) -> SlotTable:
        """Create a table of the same implementation on the same device."""

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """Slots of ``ids``, int64 [n]; NO_SLOT for an id without one. Changes nothing."""

    @abstractmethod
    def assign(self, ids: Tensor, step: int) -> Assignment:
        """Give slots to a training batch. ``step`` starts at 1 or above and grows with every call."""

    def content(self) -> tuple[Tensor, Tensor]:
        """(ids, scores) of the slots in use, by slot; views."""
        return self.ids[: self.size], self.scores[: self.size]

    def restore(self, ids: Tensor, scores: Tensor) -> None:
        """Replace the content by at most ``capacity`` ids with their ``scores``, in slots 0, 1, …"""
        self.size = len(ids)
        self.ids[: self.size], self.scores[: self.size] = ids, scores
        self._rebuild()

    @abstractmethod
    def _rebuild(self) -> None:
        """Follow ``ids``, ``scores`` and ``size``, which have been overwritten."""


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

"""Which row ("slot") of a table's shard holds which id: what every implementation must do, bit for bit.

A shard has ``capacity`` slots, and any id may lie in any slot. A batch is a multiset: neither the order of its ids nor
where they stand decides who gets a slot. In ``assign``, at step t,

1. an id that has a slot gets its occurrences added to its count and t as its last step;
2. one that has none and was sighted fewer than ``admission_threshold`` times, this batch included, gets none;
3. the others get slots that were never used; where these run out, they compete with the ids that have a slot and are
   not of this batch: the highest scores stay, or come in.

An id that comes in takes the slot of the lowest score that goes. Under lru all new ids score higher than any that is
not of the batch; under lfu one that occurs once does not drive out one that was seen twice.

Scores are int64, and ids of equal scores are told apart by their hash (hstu.data.hashing.splitmix64): the lower goes.

    lru    last step · 2^31 + count       the least recently seen goes, of several the least seen
    lfu    count · 2^32 + last step       the least often seen goes, of several the least recent
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
"""Where counts stop."""
MAX_STEP = 2**32 - 1
NO_SLOT = -1


@dataclass
class Counters:
    """What has happened to the ids of training batches; a repeated id counts each time in the first four."""

    lookups: int = 0
    hits: int = 0
    """Of ids that had a row before the batch."""
    waiting: int = 0
    """Of ids that admission_threshold keeps out so far."""
    rejections: int = 0
    """Of ids for which there was no room: all rows were of the same batch, or (lfu) of ids seen more often."""
    insertions: int = 0
    evictions: int = 0

    def add(self, other: Counters) -> None:
        """Add ``other``, counter by counter."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True)
class Assignment:
    """What became of a batch of n ids. All tensors int64."""

    slots: Tensor
    """[n]: the slot of each id, or NO_SLOT."""
    new_slots: Tensor
    """[k]: slots that were given to an id by this batch; their rows must be made anew."""
    new_ids: Tensor
    """[k]: the ids they were given to."""
    evicted_ids: Tensor
    """[v]: ids that have lost their slot."""
    counters: Counters


class SlotTable(ABC):
    """Ids, scores and slots of one shard.

    ``ids`` and ``scores``, int64 [capacity], are the state, of which the first ``size`` are in use; whatever else an
    implementation keeps can be made from them. ``admission_threshold`` > 1 asks for a second table of that size,
    without rows and under lru, of the sightings of ids that have none: one that it forgets starts over.
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
        """A table of the same implementation."""

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """Slots of ``ids``, int64 [n], NO_SLOT for those that have none. Changes nothing."""

    @abstractmethod
    def assign(self, ids: Tensor, step: int) -> Assignment:
        """Slots of a training batch; ``step``: 1 at least, and more at every call."""

    def content(self) -> tuple[Tensor, Tensor]:
        """(ids, scores) of the slots in use, in the order of the slots; views."""
        return self.ids[: self.size], self.scores[: self.size]

    def restore(self, ids: Tensor, scores: Tensor) -> None:
        """Forget everything and hold ``ids`` with their ``scores``, at most ``capacity``, in slots 0, 1, …"""
        self.size = len(ids)
        self.ids[: self.size], self.scores[: self.size] = ids, scores
        self._rebuild()

    @abstractmethod
    def _rebuild(self) -> None:
        """``ids``, ``scores`` and ``size`` were set from outside."""


def score(policy: Policy, counts: Tensor, step: int | Tensor) -> Tensor:
    """Scores of ids that were seen ``counts`` times and last at ``step``."""
    counts = counts.clamp(max=MAX_COUNT)
    return (step << 31) + counts if policy == "lru" else (counts << 32) + step


def counts_of(policy: Policy, scores: Tensor) -> Tensor:
    """How often ids of these scores were seen."""
    return scores & MAX_COUNT if policy == "lru" else scores >> 32


def steps_of(policy: Policy, scores: Tensor) -> Tensor:
    """When ids of these scores were last seen."""
    return scores >> 31 if policy == "lru" else scores & MAX_STEP


def in_order(scores: Tensor, ids: Tensor) -> Tensor:
    """Places of ids by ascending score, and by hash where scores are equal: the order in which ids are evicted."""
    by_hash = in_unsigned_order(mix(ids)).argsort()
    return by_hash[scores[by_hash].argsort(stable=True)]

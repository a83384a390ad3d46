"""Assignment of ids to the rows ("slots") of a table's shard: specification, and implementation in PyTorch.

A shard has ``capacity`` slots, and any id may get any slot. A batch is a multiset of ids. ``assign`` at step t does:

1. For an id with a slot, add its occurrences to its count, and set its last step to t.
2. Give no slot to a new id that was seen fewer than ``admission_threshold`` times, including this batch.
3. Give unused slots to the other new ids. When none is left, new ids compete with the ids that have a slot and are not
   in this batch: the highest scores win, and the winners take the slots of the lowest scores.

Under lru every new id scores higher than any id outside the batch. Under lfu an id that occurs once does not evict an
id that was seen twice. The implementation chooses which of these slots each winner gets, depending only on the batches.

Scores are int64. Equal scores are ordered by the hash of their ids (hstu.base.hashing.splitmix64); the lower one goes.

    lru    last step · 2^31 + count       evicts the least recently seen id, among equals the least often seen
    lfu    count · 2^32 + last step       evicts the least often seen id, among equals the least recently seen
    none   as lfu                         evicts nothing: new ids compete among themselves for the unused slots
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hstu.parallel.dynamic.hashing import in_unsigned_order, mix, unmix

Policy = Literal["lru", "lfu", "none"]
POLICIES: tuple[Policy, ...] = ("lru", "lfu", "none")
MAX_COUNT = 2**31 - 1
MAX_STEP = 2**32 - 1
NO_SLOT = -1
HIGHEST = 2**63 - 1
"""Score of an unused slot, above all others."""


@dataclass
class Counters:
    """Event counts of training batches. The first four count every occurrence of a repeated id."""

    lookups: int = 0
    hits: int = 0
    """Lookups of ids that had a row before the batch."""
    waiting: int = 0
    """Lookups of ids below admission_threshold."""
    rejections: int = 0
    """Lookups of ids without room: all rows belong to ids of the same batch, (lfu) to ids seen more often, or (none) to
    any ids."""
    insertions: int = 0
    evictions: int = 0


_INSERTIONS = [field.name for field in fields(Counters)].index("insertions")


@dataclass(frozen=True)
class Assignment:
    """Result of ``assign`` for a batch of n ids. All tensors are int64.

    Fixed lengths spare the host from waiting: only the first ``insertions`` entries of ``new_slots`` and ``new_ids``
    are set.
    """

    slots: Tensor
    """[n]: slot of each id, or NO_SLOT."""
    new_slots: Tensor
    """Newly assigned slots, whose rows must be initialised."""
    new_ids: Tensor
    """Ids of ``new_slots``."""
    counts: Tensor
    """[6]: event counts in the order of Counters."""

    @property
    def insertions(self) -> Tensor:
        """[1]: number of newly assigned slots."""
        return self.counts[_INSERTIONS : _INSERTIONS + 1]


class SlotTable(ABC):
    """Ids, scores and slots of one shard.

    With ``admission_threshold`` > 1, ``sightings`` counts how often ids without a slot were seen: an lru SlotTable of
    the same capacity. An id that it evicts restarts at zero.
    """

    sightings: SlotTable | None = None
    kernels: ModuleType | None = None
    """hstu.ops.triton.slots if it supports the table: the host then never waits for results that depend on ids."""

    def __init__(self, capacity: int, policy: Policy, admission_threshold: int = 0) -> None:
        self.capacity = capacity
        self.policy = policy
        self.admission_threshold = admission_threshold

    @abstractmethod
    def size(self) -> Tensor:
        """Return the number of slots in use: int64 [1], on the table's device."""

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """Return the slots of ``ids``, int64 [n], or NO_SLOT. Changes nothing."""

    @abstractmethod
    def assign(self, ids: Tensor, step: int, counts: Tensor | None = None) -> Assignment:
        """Assign slots to a training batch. ``step`` is at least 1 and grows with every call.

        ``counts``: int64 [n], how many occurrences in the batch each entry of ``ids`` stands for; None: one. An id
        without occurrences changes nothing, and its slot in the result has no meaning.
        """

    @abstractmethod
    def content(self) -> tuple[Tensor, Tensor]:
        """Return (ids, scores) of the slots in use, by slot: the whole state."""

    @abstractmethod
    def restore(self, ids: Tensor, scores: Tensor) -> None:
        """Replace the content by at most ``capacity`` ids with their ``scores``, in slots 0, 1, …"""

    def free_unseen(self, since: int) -> tuple[int, Tensor, Tensor]:
        """Free the slots of ids that were last seen before step ``since``, and fill the gaps from the end.

        Returns the number of freed slots, and the old and the new slots of ids that moved, int64 [m]. The host waits.
        """
        ids, scores = self.content()
        stays = steps_of(self.policy, scores) >= since
        kept = int(stays.sum())
        source, target = stays[kept:].nonzero()[:, 0] + kept, (~stays[:kept]).nonzero()[:, 0]
        if kept < len(ids):
            order = torch.arange(kept, device=ids.device).index_copy(0, target, source)
            self.restore(ids[order], scores[order])
        return len(ids) - kept, source, target


def score(policy: Policy, counts: Tensor, step: int | Tensor) -> Tensor:
    """Return the scores of ids seen ``counts`` times, and last at ``step``."""
    counts = counts.clamp(max=MAX_COUNT)
    return (step << 31) + counts if policy == "lru" else (counts << 32) + step


def counts_of(policy: Policy, scores: Tensor) -> Tensor:
    """Return how often the ids of these scores were seen."""
    return scores & MAX_COUNT if policy == "lru" else scores >> 32


def steps_of(policy: Policy, scores: Tensor) -> Tensor:
    """Return the step at which the ids of these scores were last seen."""
    return scores >> 31 if policy == "lru" else scores & MAX_STEP


def eviction_order(scores: Tensor, ids: Tensor) -> Tensor:
    """Return the indices of ids in eviction order: by ascending score, then by hash."""
    by_hash = in_unsigned_order(mix(ids)).argsort()
    return by_hash[scores[by_hash].argsort(stable=True)]


class SortedIndex:
    """Finds the slot of a key on any device. Sorts all keys after every change."""

    def __init__(self, keys: Tensor) -> None:
        """``keys``: int64 [capacity], live: the key of each slot."""
        self._keys = keys
        self._places = torch.arange(len(keys), device=keys.device)
        self.insert(self._places, torch.zeros_like(self._places[:1]))

    def find(self, wanted: Tensor) -> Tensor:
        """Return the slots of keys, int64 [n], or NO_SLOT."""
        place = torch.searchsorted(self._sorted, wanted).clamp_(max=len(self._keys) - 1)
        slots = self._slots[place]
        return torch.where((self._sorted[place] == wanted) & (slots < self._size), slots, NO_SLOT)

    def insert(self, slots: Tensor, size: Tensor) -> None:
        """Update the index to the first ``size``, int64 [1], of the live keys."""
        self._size = size
        used = torch.where(self._places < size, self._keys, HIGHEST)  # used keys precede equal unused ones
        self._sorted, self._slots = used.sort(stable=True)


class TorchSlots(SlotTable):
    """See SlotTable. Stores hashes of ids. All tensor sizes are fixed, so the host waits only in ``content``."""

    sightings: TorchSlots | None

    def __init__(
        self,
        capacity: int,
        policy: Policy,
        admission_threshold: int = 0,
        device: torch.device | str = "cpu",
        kernels: ModuleType | None = None,
    ) -> None:
        super().__init__(capacity, policy, admission_threshold)
        self.kernels = kernels
        # The last element absorbs writes that belong to no slot.
        self._hashes = torch.zeros(capacity + 1, dtype=torch.int64, device=device)
        self._scores = torch.full_like(self._hashes, HIGHEST)
        self.restore(self._hashes[:0], self._scores[:0])
        if admission_threshold > 1:
            self.sightings = TorchSlots(capacity, "lru", 0, device, kernels)

    def size(self) -> Tensor:
        """See SlotTable."""
        return self._size

    def lookup(self, ids: Tensor) -> Tensor:
        """See SlotTable."""
        return self._index.find(_hashed(ids))

    def content(self) -> tuple[Tensor, Tensor]:
        """See SlotTable; the ids are a copy."""
        size = int(self._size)
        return _ids(self._hashes[:size]), self._scores[:size]

    def restore(self, ids: Tensor, scores: Tensor) -> None:
        """See SlotTable."""
        number = self._size_at_most = len(ids)
        self._hashes[:number], self._scores[:number] = _hashed(ids), scores
        self._scores[number:] = HIGHEST
        self._size = torch.full_like(self._hashes[:1], number)
        kind = SortedIndex if self.kernels is None else self.kernels.SlotIndex
        self._index = kind(self._hashes[: self.capacity])
        self._index.insert(torch.arange(number, device=self._hashes.device), self._size)

    def assign(self, ids: Tensor, step: int, counts: Tensor | None = None) -> Assignment:
        """See SlotTable."""
        if not len(ids):
            return Assignment(ids, ids, ids, ids.new_zeros(len(fields(Counters))))
        hashes, order = _hashed(ids).sort()
        begins = torch.ones_like(hashes, dtype=torch.bool)
        torch.ne(hashes[1:], hashes[:-1], out=begins[1:])
        number = begins.cumsum(0) - 1
        distinct = torch.zeros_like(hashes).scatter(0, number, hashes)
        occurrences = torch.ones_like(hashes) if counts is None else counts[order]
        counts = torch.zeros_like(hashes).scatter_add(0, number, occurrences)
        added = self._add(distinct, counts, step)
        waiting = added.is_new & ~added.is_admitted
        rejected = added.is_admitted & ~added.is_placed
        counters = [
            counts.sum(),
            (counts * ~added.is_new).sum(),
            (counts * waiting).sum(),
            (counts * rejected).sum(),
            added.is_placed.sum(),
            (added.victims < self.capacity).sum(),
        ]
        return Assignment(
            slots=torch.zeros_like(hashes).scatter(0, order, added.slots[number]),
            new_slots=_compacted(added.slots, added.is_placed),
            new_ids=_ids(_compacted(distinct, added.is_placed)),
            counts=torch.stack(counters),
        )

    def _add(self, hashes: Tensor, counts: Tensor, step: int) -> _Added:
        """Count distinct ids and assign slots to new ones. Entries with a count of 0 are padding."""
        number, none = len(hashes), self.capacity
        slots = self._index.find(hashes)
        held = torch.where((counts > 0) & (slots != NO_SLOT), slots, none)
        held_scores = score(self.policy, counts_of(self.policy, self._scores[held]) + counts, step)
        self._scores[held] = HIGHEST  # protects ids of the batch from eviction
        is_admitted = is_new = (counts > 0) & (slots == NO_SLOT)
        if self.sightings is not None:
            sighted = self.sightings._sight(hashes, counts * is_new, step)
            is_admitted = is_new & (sighted >= self.admission_threshold)
        scores = torch.where(is_admitted, score(self.policy, counts, step), HIGHEST)
        unused = none - self._size
        self._size_at_most += number
        victims, is_placed = torch.full_like(slots, none), is_admitted
        if self._size_at_most > self.capacity:
            self._size_at_most = self.capacity
            losers = self._lowest(scores, hashes, (is_admitted.sum() - unused).clamp(min=0))
            victims = _compacted(losers, losers < none, fill=none)
            is_rejected = torch.zeros(number + 1, dtype=torch.bool, device=slots.device)
            is_rejected[torch.where(losers >= none, losers - none, number)] = True
            is_placed = is_admitted & ~is_rejected[:number]
        rank = is_placed.cumsum(0) - 1
        of_victim = victims[(rank - unused).clamp(min=0)]
        slots = torch.where(is_placed, torch.where(rank < unused, self._size + rank, of_victim), slots)
        written = torch.where(is_placed, slots, none)
        self._hashes[written], self._scores[written] = hashes, scores
        self._scores[held] = held_scores
        self._size = torch.minimum(self._size + is_placed.sum(), torch.full_like(self._size, self.capacity))
        self._index.insert(torch.where(is_placed, slots, NO_SLOT), self._size)
        return _Added(slots, is_new, is_admitted, is_placed, victims)

    def _lowest(self, scores: Tensor, hashes: Tensor, excess: Tensor) -> Tensor:
        """Select the ``excess``, int64 [1], lowest scores among all slots and n new ids: [n].

        Entries are slot numbers, or ``capacity`` + i for the i-th new id, then ``capacity`` + n as padding.
        """
        of_slots, of_hashes = self._scores[: self.capacity], self._hashes[: self.capacity]
        if self.policy == "none":
            of_slots = torch.full_like(of_slots, HIGHEST)
        lowest, indices = _smallest(of_slots, scores)
        threshold = lowest.gather(0, (excess - 1).clamp(min=0))
        below = (lowest < threshold).sum()
        _, ties = _smallest(
            torch.where(of_slots == threshold, of_hashes, HIGHEST), torch.where(scores == threshold, hashes, HIGHEST)
        )
        place = torch.arange(len(scores), device=scores.device)
        listed = torch.where(place < below, indices, ties[(place - below).clamp(min=0)])
        return torch.where(place < excess, listed, self.capacity + len(scores))

    def _sight(self, hashes: Tensor, counts: Tensor, step: int) -> Tensor:
        """Add ``counts`` sightings of distinct ids; return how often each was seen so far, int64 [n]."""
        slots = self._add(hashes, counts, step).slots
        return torch.where(slots != NO_SLOT, counts_of(self.policy, self._scores[slots]), counts)


class _Added(NamedTuple):
    """What ``_add`` did with n distinct ids."""

    slots: Tensor
    """[n]: current slots, or NO_SLOT."""
    is_new: Tensor
    """bool [n]: had no slot."""
    is_admitted: Tensor
    """bool [n]: new and let in by admission_threshold."""
    is_placed: Tensor
    """bool [n]: admitted and got a slot."""
    victims: Tensor
    """[n]: slots taken from other ids, padded with ``capacity``."""


def _hashed(ids: Tensor) -> Tensor:
    return in_unsigned_order(mix(ids))


def _ids(hashes: Tensor) -> Tensor:
    return unmix(in_unsigned_order(hashes))


def _smallest(many: Tensor, few: Tensor) -> tuple[Tensor, Tensor]:
    """Return the len(few) smallest numbers of both, ascending, and their indices in the concatenation of both."""
    number = min(len(many), len(few))
    values, indices = many.topk(number, largest=False)
    indices = torch.cat([indices, torch.arange(len(many), len(many) + len(few), device=few.device)])
    values, order = torch.cat([values, few]).sort()
    return values[: len(few)], indices[order[: len(few)]]


def _compacted(values: Tensor, mask: Tensor, fill: int = 0) -> Tensor:
    """Return the ``values`` [n] where the mask is set, in order, padded with ``fill``."""
    last = len(values)
    places = torch.where(mask, mask.cumsum(0) - 1, last)
    return values.new_full((last + 1,), fill).scatter(0, places, values)[:last]

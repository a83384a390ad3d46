"""The content of a dynamic table without its layout: what is saved, moved between ranks and restored.

StepTimes notes when a table had seen how many training batches, so that a time can stand for a batch.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hstu.config.args import DynamicEmbeddingArgs
from hstu.parallel.dynamic.hashing import mix
from hstu.parallel.dynamic.slots import Policy, counts_of, eviction_order, score, steps_of

INTERVAL_S = 60.0
"""Least distance of two entries, unless a save adds one."""
MAX_ENTRIES = 1024

Entries = tuple[tuple[float, int], ...]
"""(seconds since 1970, training batches done by then): times never fall, batches rise."""


@dataclass(frozen=True)
class Sightings:
    """Ids that have been sighted but have no row: int64 [m], with lru scores."""

    ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class TableContent:
    """n ids of a table and all that belongs to them. Checkpoints store the fields under these names."""

    policy: Policy
    step: int
    """Training batches that the table has seen."""
    ids: Tensor
    """int64 [n]."""
    scores: Tensor
    """int64 [n]."""
    changed: Tensor
    """int64 [n]: the last training batch that changed the row, as an id of the batch or as a negative."""
    rows: Tensor
    """float32 [n, dim]."""
    states: Mapping[str, Tensor]
    """Optimizer states by name: float32 [n, dim], or [n] if rowwise."""
    sightings: Sightings | None = None
    times: Entries = ()
    """When how many batches were done; empty where that is unknown."""

    def select(self, index: Tensor) -> TableContent:
        """The ids at ``index``, a mask [n] or indices, with all sightings."""
        return replace(
            self,
            ids=self.ids[index],
            scores=self.scores[index],
            changed=self.changed[index],
            rows=self.rows[index],
            states={name: state[index] for name, state in self.states.items()},
        )

    def changed_since(self, step: int) -> TableContent:
        """The ids whose rows changed after batch ``step``."""
        return self.select(self.changed > step)

    def scored_by(self, policy: Policy) -> TableContent:
        """The same counts and steps as scores of ``policy``."""
        scores = score(policy, counts_of(self.policy, self.scores), steps_of(self.policy, self.scores))
        return replace(self, policy=policy, scores=scores)


def merged(parts: Sequence[TableContent]) -> TableContent:
    """Parts of one table, with no id in common, as one."""
    sightings = [part.sightings for part in parts if part.sightings is not None]
    return TableContent(
        policy=parts[0].policy,
        step=max(part.step for part in parts),
        ids=torch.cat([part.ids for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        changed=torch.cat([part.changed for part in parts]),
        rows=torch.cat([part.rows for part in parts]),
        states={name: torch.cat([part.states[name] for part in parts]) for name in parts[0].states},
        sightings=Sightings(torch.cat([s.ids for s in sightings]), torch.cat([s.scores for s in sightings]))
        if sightings
        else None,
        times=last_of_all([part.times for part in parts]),
    )


def last_evicted(ids: Tensor, scores: Tensor, number: int) -> Tensor:
    """Indices, ascending, of the ``number`` ids that would be evicted last."""
    return eviction_order(scores, ids)[max(0, len(ids) - number) :].sort().values


def owners(ids: Tensor, args: DynamicEmbeddingArgs, local_capacity: int, world_size: int) -> Tensor:
    """The rank that owns each id, int64 [n]: the one to which DynamicFeaturesDist sends it."""
    words = mix(ids) if args.dist_type == "hash_roundrobin" else ids
    # The remainder of an unsigned division: that of all bits but the last, doubled, plus the last bit.
    half = (words >> 1) & torch.iinfo(torch.int64).max
    turns = (half % world_size * 2 + (words & 1)) % world_size
    if args.dist_type != "continuous":
        return turns
    in_range = (ids >= 0) & (ids < local_capacity * world_size)
    return torch.where(in_range, ids.div(local_capacity, rounding_mode="floor"), turns)


class StepTimes:
    """A short log of ``Entries``. It is no training state: two equal runs have different times.

    When the log grows too long, the entry that is missed least is dropped, so the distance of old entries grows in
    proportion to their age. A time without an entry stands for an earlier batch, never for a later one. A clock that is
    set back counts as one that stands still.
    """

    def __init__(self, entries: Entries = (), clock: Callable[[], float] = time.time) -> None:
        self._entries = list(entries)
        self._clock = clock
        self._latest = entries[-1][0] if entries else -math.inf

    def note(self, step: int, *, saving: bool = False) -> None:
        """Note that all batches up to ``step`` are done. ``saving``: keep the entry however recent the last one is."""
        self._latest = max(self._latest, self._clock())
        if self._entries:
            moment, known = self._entries[-1]
            if step <= known or (self._latest < moment + INTERVAL_S and not saving):
                return
        self._entries.append((math.ceil(self._latest * 1000) / 1000, step))  # rounded up, so never too early
        if len(self._entries) > MAX_ENTRIES:
            self._drop_one()

    def _drop_one(self) -> None:
        """Drop the entry whose neighbours are closest for its age; never the first or the last one."""
        times = np.array([moment for moment, _ in self._entries])
        gaps = (times[2:] - times[:-2]) / (times[-1] - times[1:-1] + INTERVAL_S)
        del self._entries[1 + int(gaps.argmin())]

    @property
    def entries(self) -> Entries:
        """The log, to be saved."""
        return tuple(self._entries)


def newest_before(entries: Entries, moment: float) -> tuple[float, int] | None:
    """The newest entry at or before ``moment`` (seconds since 1970); None if the log begins later.

    Rows that changed since ``moment`` changed after the batch of that entry.
    """
    index = bisect_right(entries, moment, key=lambda entry: entry[0])
    return entries[index - 1] if index else None


def last_of_all(logs: Sequence[Entries]) -> Entries:
    """One log for several ranks, in which a batch is done when the last rank has done it."""
    entries = []
    for _, step in logs[0]:
        indices = [bisect_left(log, step, key=lambda entry: entry[1]) for log in logs]
        if all(index < len(log) for index, log in zip(indices, logs, strict=True)):
            entries.append((max(log[index][0] for index, log in zip(indices, logs, strict=True)), step))
    return tuple(entries)

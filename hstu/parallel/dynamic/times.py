"""When a dynamic table had seen how many training batches, so that a time can stand for a batch."""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

import numpy as np

INTERVAL_S = 60.0
"""Least distance of two entries, unless a save adds one."""
MAX_ENTRIES = 1024

Entries = tuple[tuple[float, int], ...]
"""(seconds since 1970, training batches done by then): times never fall, batches rise."""


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

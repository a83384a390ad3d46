"""When a dynamic table had seen how many training batches, so that a time can stand for one."""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

import numpy as np

INTERVAL_S = 60.0
"""What entries that no save has made are apart, at least."""
MAX_ENTRIES = 1024

Entries = tuple[tuple[float, int], ...]
"""(seconds since 1970, training batches done by then): times that never fall, batches that rise."""


class StepTimes:
    """A short log of ``Entries``.

    It is not training state: equal runs have other times. Where it grows too long, what is missed least is dropped, so
    that entries of long ago are apart in proportion to their age. Without an entry a time stands for an earlier batch,
    never for a later one. A clock that is put back counts as one that stands still.
    """

    def __init__(self, entries: Entries = (), clock: Callable[[], float] = time.time) -> None:
        self._entries = list(entries)
        self._clock = clock
        self._latest = entries[-1][0] if entries else -math.inf

    def note(self, step: int, *, saving: bool = False) -> None:
        """All batches up to ``step`` are done. ``saving``: keep this, however new the last entry is."""
        self._latest = max(self._latest, self._clock())
        if self._entries:
            moment, known = self._entries[-1]
            if step <= known or (self._latest < moment + INTERVAL_S and not saving):
                return
        self._entries.append((math.ceil(self._latest * 1000) / 1000, step))  # never before it was so
        if len(self._entries) > MAX_ENTRIES:
            self._drop_one()

    def _drop_one(self) -> None:
        """The entry whose neighbours are closest, for its age; never the first or the last one."""
        times = np.array([moment for moment, _ in self._entries])
        gaps = (times[2:] - times[:-2]) / (times[-1] - times[1:-1] + INTERVAL_S)
        del self._entries[1 + int(gaps.argmin())]

    @property
    def entries(self) -> Entries:
        """What there is to save."""
        return tuple(self._entries)


def newest_before(entries: Entries, moment: float) -> tuple[float, int] | None:
    """The newest entry at or before ``moment`` (seconds since 1970): rows changed since then changed after its batch.

    None: the log begins later.
    """
    place = bisect_right(entries, moment, key=lambda entry: entry[0])
    return entries[place - 1] if place else None


def last_of_all(logs: Sequence[Entries]) -> Entries:
    """One log of several ranks', as the slowest of them: a batch is done when all of them have done it."""
    entries = []
    for _, step in logs[0]:
        places = [bisect_left(log, step, key=lambda entry: entry[1]) for log in logs]
        if all(place < len(log) for place, log in zip(places, logs, strict=True)):
            entries.append((max(log[place][0] for place, log in zip(places, logs, strict=True)), step))
    return tuple(entries)

"""Random windows of long histories: DatasetArgs.random_windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hstu.base.hashing import random_uniform
from hstu.config.args import DatasetArgs

_STREAM = 0x5749_4E44
"""Separates these draws from those of negatives, which have the same seed."""


@dataclass(frozen=True)
class RandomWindows:
    """Which window of a long history a training sample has in an epoch.

    The window begins at event floor(uniform * T) of the T events of a history, or is the newest window if fewer than
    its L events follow. With uniform ends instead, the newest event, nearest to what is to be recommended, would be in
    it once in T - L + 1 epochs. Here it is in it in L / T of the epochs, as are the events in the middle. The draw
    depends on (seed, epoch, place in the epoch) alone: equal at any world size, with any number of workers and after a
    resume.
    """

    seed: int

    @classmethod
    def of(cls, args: DatasetArgs, seed: int) -> RandomWindows | None:
        """From the options; None where they are off."""
        return cls(seed) if args.random_windows else None

    def starts(
        self, begin: np.ndarray, newest: np.ndarray, stop: np.ndarray, epoch: int, ordinals: np.ndarray
    ) -> np.ndarray:
        """First events of the windows of b samples in an epoch, int64 [b].

        begin, stop: bounds of the histories. newest: first events of their newest windows. ordinals: places in the
        epoch. All int64 [b].
        """
        uniform = random_uniform(self.seed, _STREAM, epoch, ordinals)
        return np.minimum(begin + (uniform * (stop - begin)).astype(np.int64), newest)


def coverage(place: np.ndarray, history: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Probability that an event is in a random window; float64 [n].

    place: of the event in its history, from 0. history, window: numbers of events. All int64 [n].
    """
    first = np.maximum(place + 1 - window, 0)
    older = np.minimum(place + 1, history - window) - first  # windows before the newest that have the event
    probability: np.ndarray = (np.maximum(older, 0) + window * (place >= history - window)) / history
    return probability

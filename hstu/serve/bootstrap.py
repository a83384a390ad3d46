"""Confidence intervals by the bootstrap over users: how a metric varies if other users had been evaluated.

Users are drawn with replacement, each with all predictions for that user, because those are not independent. Intervals
are percentiles of the resampled metrics (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hstu.data.batches.jagged import ranges, run_indices
from hstu.parallel.collectives import gather_objects
from hstu.parallel.mesh import Mesh
from hstu.train.metrics import undefined_without_warning
from hstu.train.observations import Observations

Interval = tuple[float, float]
Statistic = Callable[[np.ndarray], dict[str, float]]
"""Places of drawn users, int64 [U], which may repeat → metrics of these users."""


@dataclass(frozen=True)
class Resampling:
    """How often users are drawn, and by which ranks. The draws depend on the seed alone."""

    mesh: Mesh
    resamples: int = 200
    """0: no intervals."""
    confidence: float = 0.95
    seed: int = 0

    def draw(self, statistic: Statistic, num_users: int) -> dict[str, np.ndarray]:
        """The statistic of each resample, float64 [resamples]; nan where it is undefined. Collective.

        Each rank computes some of the resamples. Empty without resamples, and for fewer than two users, of whom nothing
        can be learnt about others.
        """
        if not self.resamples or num_users < 2:
            return {}
        own = []
        with undefined_without_warning():
            for number in range(self.mesh.rank, self.resamples, self.mesh.world_size):
                self.mesh.heartbeat.beat()
                drawn = np.random.default_rng([self.seed, number]).integers(0, num_users, num_users)
                own.append(statistic(drawn))
        of_ranks = gather_objects(own, self.mesh.world_group)
        found = [of_ranks[number % len(of_ranks)][number // len(of_ranks)] for number in range(self.resamples)]
        return {name: np.array([each[name] for each in found]) for name in found[0]}

    def intervals(self, statistic: Statistic, num_users: int) -> dict[str, Interval]:
        """The confidence interval of each metric; nan if no resample defines it. Collective."""
        return {name: self.interval(values) for name, values in self.draw(statistic, num_users).items()}

    def interval(self, values: np.ndarray) -> Interval:
        """The middle ``confidence`` of resampled values that are not nan."""
        defined = values[~np.isnan(values)]
        if not len(defined):
            return float("nan"), float("nan")
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(defined, [tail, 1 - tail])
        return float(low), float(high)


class ByUser:
    """Observations that are drawn user by user."""

    def __init__(self, observations: Observations) -> None:
        self.users, counts = np.unique(observations.users, return_counts=True)
        """int64 [U], ascending."""
        self._sorted = observations.select(np.argsort(observations.users, kind="stable"))
        self._starts, self._counts = np.cumsum(counts) - counts, counts
        self._next_request = int(observations.requests.max(initial=-1)) + 1

    def draw(self, drawn: np.ndarray) -> Observations:
        """The observations of drawn users, given by their places in ``users``; one who is drawn twice is two users."""
        counts = self._counts[drawn]
        found = self._sorted.select(ranges(self._starts[drawn], counts))
        draw, _ = run_indices(counts)
        # GAUC weights users by their predictions, so two copies under one number count as two users. Requests must be
        # told apart: the candidates of two copies would be ordered together.
        return replace(found, requests=found.requests + draw * self._next_request)

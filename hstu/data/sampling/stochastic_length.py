"""Stochastic length: DatasetArgs.stochastic_length_alpha."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hstu.base.hashing import random_uniform
from hstu.config.args import DatasetArgs

_STREAM = 0x5354_4F43
"""Separates these draws from those of negatives, which have the same seed."""


@dataclass(frozen=True)
class StochasticLength:
    """Which training samples are shortened in an epoch, and to what (arXiv 2402.17152, "stochastic length").

    Of a sample of n > s events the newest s are kept with probability 1 - (s / n)^2, where
    s = max_sequence_length ^ (alpha / 2); of the paper's ways to choose the s events this is the greedy one. The draw
    depends on (seed, epoch, place in the epoch) alone: equal at any world size, with any number of workers and after a
    resume.
    """

    kept: int
    """s."""
    seed: int
    unlabelled: int
    """Events at the start of a sample that are no labels: 1 for retrieval, else 0."""

    @classmethod
    def of(cls, args: DatasetArgs, seed: int, unlabelled: int) -> StochasticLength | None:
        """From the options; None where stochastic length is off. At least one event of history stays."""
        if args.stochastic_length_alpha is None:
            return None
        kept = round(args.max_sequence_length ** (args.stochastic_length_alpha / 2))
        return cls(max(kept, 2, args.max_num_candidates + 1), seed, unlabelled)

    def shorten(
        self,
        lengths: np.ndarray,
        labels: np.ndarray,
        epoch: int,
        ordinals: np.ndarray,
        candidates: np.ndarray | int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(items kept, labels kept) of b samples, the newest ones, candidates and one more at least; int64 [b]."""
        uniform = random_uniform(self.seed, _STREAM, epoch, ordinals)
        whole = (lengths <= self.kept) | (uniform * lengths.astype(np.float64) ** 2 < self.kept**2)
        shorter = np.where(whole, lengths, np.maximum(self.kept, candidates + 1))
        return shorter, np.minimum(labels, shorter - self.unlabelled)

"""Samples as runs of events: the table of them, several from one long history, and shorter ones by chance.

All of it is vectorised over samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from hstu.config.args import DatasetArgs
from hstu.data.hashing import random_bits


@dataclass(frozen=True)
class SampleTable:
    """S samples, in the store's order of users. Events are positions in the store's flat arrays; all int64 [S]."""

    user: np.ndarray
    """Row of the user in the store."""
    start: np.ndarray
    """First event of the sample, after truncation to the newest ones."""
    stop: np.ndarray
    """One past the last event of the sample."""
    num_candidates: np.ndarray
    """The newest events of the sample that are candidates."""
    num_labels: np.ndarray
    """The newest events of the sample that are labelled."""
    target: np.ndarray | None
    """Retrieval evaluation: the held-out event."""
    history_begin: np.ndarray
    """First event of the user; the seen items are those of [history_begin, target)."""
    report: dict[str, int] = field(default_factory=dict)
    """users of the split; samples made of them; dropped_short users; truncated users, whose oldest events no sample
    has; events of all samples."""

    def __len__(self) -> int:
        """S."""
        return len(self.user)

    def select(self, keep: np.ndarray) -> SampleTable:
        """Some of the samples, bool [S]; the report stays."""
        return SampleTable(
            user=self.user[keep],
            start=self.start[keep],
            stop=self.stop[keep],
            num_candidates=self.num_candidates[keep],
            num_labels=self.num_labels[keep],
            target=None if self.target is None else self.target[keep],
            history_begin=self.history_begin[keep],
            report=self.report,
        )


def in_windows(samples: SampleTable, args: DatasetArgs, unlabelled: int) -> SampleTable:
    """Training samples of whole histories: with window_stride, older windows as well, each user's newest first.

    Window k has the max_sequence_length events that end k * window_stride before the history does, as far as there are
    so many, and is labelled on its newest window_stride events (max_num_candidates, where there are candidates); the
    oldest window, which begins with the history, on all but the first ``unlabelled`` events. So every event is a label
    once, after as much history as fits, but where stride + unlabelled exceeds the length.
    """
    stride, length = args.window_stride, args.max_sequence_length
    if stride is None:
        return samples
    older = -(-np.maximum(samples.stop - samples.history_begin - length, 0) // stride)
    rows = np.repeat(np.arange(len(samples)), 1 + older)
    back = np.arange(len(rows)) - np.repeat(np.cumsum(1 + older) - (1 + older), 1 + older)
    begin, stop = samples.history_begin[rows], samples.stop[rows] - back * stride
    start = np.maximum(begin, stop - length)
    candidates = np.minimum(samples.num_candidates[rows], stop - start - 1)
    all_labels = stop - start - unlabelled
    labels = np.where(back == older[rows], all_labels, np.minimum(stride, all_labels))
    kept = stop - start > unlabelled if not args.max_num_candidates else candidates > 0
    table = SampleTable(
        user=samples.user[rows],
        start=start,
        stop=stop,
        num_candidates=candidates,
        num_labels=candidates if args.max_num_candidates else labels,
        target=None,
        history_begin=begin,
    )
    report = samples.report | {"samples": int(kept.sum()), "truncated": 0, "events": int((stop - start)[kept].sum())}
    return replace(table.select(kept), report=report)


@dataclass(frozen=True)
class StochasticLength:
    """Which training samples are shortened in an epoch, and to what (arXiv 2402.17152, "stochastic length").

    Of a sample of n events, n > s, the newest s are kept with probability 1 - (s / n)^2, where
    s = max_sequence_length ^ (alpha / 2). Drawn from (seed, epoch, place in the epoch) alone: equal at any world size,
    with any number of workers and after a resume. Of the ways to choose the s events it is the paper's greedy one.
    """

    kept: int
    """s."""
    seed: int
    unlabelled: int
    """Events at the start of a sample that are no labels: 1 for retrieval, else 0."""

    @classmethod
    def of(cls, args: DatasetArgs, seed: int, unlabelled: int) -> StochasticLength | None:
        """The option of ``args``; None where it is off. At least one event of history stays."""
        if args.stochastic_length_alpha is None:
            return None
        kept = round(args.max_sequence_length ** (args.stochastic_length_alpha / 2))
        return cls(max(kept, 2, args.max_num_candidates + 1), seed, unlabelled)

    def shorten(
        self, lengths: np.ndarray, labels: np.ndarray, epoch: int, ordinals: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(events kept, labels kept) of samples, all int64 [b]: the newest ones."""
        uniform = (random_bits(self.seed, _STREAM, epoch, ordinals) >> np.uint64(11)) / 2.0**53
        whole = (lengths <= self.kept) | (uniform * lengths.astype(np.float64) ** 2 < self.kept**2)
        shorter = np.where(whole, lengths, self.kept)
        return shorter, np.minimum(labels, shorter - self.unlabelled)


_STREAM = 0x5354_4F43
"""Sets these draws apart from those of negatives, which have the same seed."""

"""From users' histories to samples: splits, truncation and candidates.

A sample is a run of one user's events; nothing is copied here, a SampleTable only says which events are meant.
All of it is vectorised over users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hstu.config.args import DatasetArgs
from hstu.config.errors import ConfigError, DataError
from hstu.data.hashing import hash_strings, random_bits
from hstu.data.samples import SampleTable, in_windows
from hstu.data.store import USER_FEATURE, SequenceStore

Task = Literal["ranking", "retrieval"]
Split = Literal["train", "valid", "test", "all"]
SplitRule = Literal["leave_one_out", "user_holdout", "time"]

_RULES_OF_TASK: dict[str, tuple[SplitRule, ...]] = {
    "retrieval": ("leave_one_out",),
    "ranking": ("user_holdout", "time"),
}


@dataclass(frozen=True)
class _Runs:
    """One run of events a user, before truncation; int64 [U of the split]."""

    user: np.ndarray
    begin: np.ndarray
    stop: np.ndarray

    def select(self, keep: np.ndarray) -> _Runs:
        return _Runs(self.user[keep], self.begin[keep], self.stop[keep])

    @property
    def lengths(self) -> np.ndarray:
        return self.stop - self.begin


def resolve_split(args: DatasetArgs, task: Task) -> SplitRule:
    """The rule that ``args.split`` means for a task; ConfigError where the task has no such rule."""
    rules = _RULES_OF_TASK[task]
    if args.split == "auto":
        return rules[0]
    for rule in rules:
        if rule == args.split:
            return rule
    raise ConfigError(f"DatasetArgs.split = {args.split!r} is not a split of {task}; allowed: auto, {', '.join(rules)}")


def build_samples(store: SequenceStore, args: DatasetArgs, task: Task, split: Split, seed: int) -> SampleTable:
    """The samples of one split.

    leave_one_out: training leaves out the last 1 + valid_items events of each user; "valid" is to predict the last
    but one (with valid_items = 0 the last), "test" the last. A user needs two events for training (a history and
    a target) and one event before the target for evaluation.
    user_holdout: train_fraction of the users, first by a seeded hash of their raw id, are for training, the rest is
    both "valid" and "test". time: training has the events before the time that train_fraction of all events
    precede; "valid" and "test" are the users with later events, of which only the later events are labelled. A user
    needs one event more than candidates.
    "all": every user, unsplit (ranking on a second store).
    Too short users are dropped and counted in the report. ``seed`` matters to user_holdout alone. With window_stride,
    a long training history gives several samples (windows.py), the newest first.
    """
    rule = resolve_split(args, task)
    if task == "retrieval":
        return _leave_one_out(_whole_histories(store), args, split)
    if args.max_num_candidates >= args.max_sequence_length:
        raise ConfigError(
            f"DatasetArgs.max_num_candidates = {args.max_num_candidates} leaves no room for history in "
            f"max_sequence_length = {args.max_sequence_length}; it must be smaller"
        )
    runs = _whole_histories(store)
    if split == "all":
        return _ranking_samples(runs, args)
    if rule == "user_holdout":
        chosen = _in_training(store, args.train_fraction, seed) == (split == "train")
        samples = _ranking_samples(runs.select(chosen), args)
        return in_windows(samples, args, unlabelled=0) if split == "train" else samples
    cut = _cut_events(store, args.train_fraction)
    if split == "train":
        earlier = _ranking_samples(_Runs(runs.user, runs.begin, cut).select(cut > runs.begin), args)
        return in_windows(earlier, args, unlabelled=0)
    later = runs.stop - cut
    return _ranking_samples(runs.select(later > 0), args, num_later=later[later > 0])


def _whole_histories(store: SequenceStore) -> _Runs:
    offsets = np.asarray(store.offsets(), dtype=np.int64)
    if (backwards := np.diff(offsets) < 0).any():
        user = store.raw_ids(USER_FEATURE)[int(backwards.argmax())]
        raise DataError(f"{store.path}: the offsets of user {user} are damaged; preprocess the data again")
    return _Runs(np.arange(store.num_users, dtype=np.int64), offsets[:-1], offsets[1:])


def _leave_one_out(runs: _Runs, args: DatasetArgs, split: Split) -> SampleTable:
    if split == "all":
        raise ConfigError("DatasetArgs.eval_dataset_path is for ranking; retrieval holds out each user's last items")
    if args.max_sequence_length < 2:
        raise ConfigError("DatasetArgs.max_sequence_length must be at least 2 for retrieval: an item and its successor")
    if split == "train":
        stop = np.maximum(runs.stop - 1 - args.valid_items, runs.begin)
        kept = _Runs(runs.user, runs.begin, stop).select(stop - runs.begin >= 2)
        num_labels = np.minimum(kept.lengths, args.max_sequence_length) - 1
        return in_windows(_table(kept, args, len(runs.user), num_labels), args, unlabelled=1)
    target = runs.stop - 1 - (args.valid_items if split == "valid" else 0)
    usable = target > runs.begin
    kept = _Runs(runs.user, runs.begin, target).select(usable)
    no_labels = np.zeros(len(kept.user), dtype=np.int64)
    return _table(kept, args, len(runs.user), no_labels, target=target[usable])


def _in_training(store: SequenceStore, fraction: float, seed: int) -> np.ndarray:
    """bool [U]. Decided by raw ids alone, so that neither the order of users nor of files has a say."""
    raw_ids = store.raw_ids(USER_FEATURE)
    keys = raw_ids if raw_ids.dtype == np.int64 else hash_strings(raw_ids)
    in_training = np.zeros(store.num_users, dtype=bool)
    in_training[np.argsort(random_bits(seed, keys))[: round(fraction * store.num_users)]] = True
    return in_training


def _cut_events(store: SequenceStore, fraction: float) -> np.ndarray:
    """Each user's first event at or after the cut in time, int64 [U]; the user's end where there is none."""
    if store.timestamp_feature is None:
        raise ConfigError('DatasetArgs.split = "time" needs timestamps, and the data has none; use another split')
    times = store.sequence(store.timestamp_feature)
    middle = min(int(fraction * len(times)), len(times) - 1)
    cut = np.partition(times, middle)[middle]
    # Events are in time order within a user, so the later ones are the last ones.
    num_later = np.diff(np.searchsorted(np.flatnonzero(times >= cut), store.offsets()))
    return np.asarray(store.offsets()[1:] - num_later, dtype=np.int64)


def _ranking_samples(runs: _Runs, args: DatasetArgs, num_later: np.ndarray | None = None) -> SampleTable:
    """All candidates are labelled or, without candidates, all events; both at most the newest ``num_later``."""
    limit = runs.lengths if num_later is None else num_later
    candidates = np.minimum(limit, args.max_num_candidates)
    labels = candidates if args.max_num_candidates else np.minimum(limit, args.max_sequence_length)
    # A user with no more events than candidates has candidates = length here, hence no history, and is dropped.
    usable = runs.lengths >= 1 + candidates
    return _table(runs.select(usable), args, len(runs.user), labels[usable], candidates[usable])


def _table(
    runs: _Runs,
    args: DatasetArgs,
    num_users: int,
    num_labels: np.ndarray,
    num_candidates: np.ndarray | None = None,
    target: np.ndarray | None = None,
) -> SampleTable:
    start = np.maximum(runs.begin, runs.stop - args.max_sequence_length)
    report = {
        "users": num_users,
        "samples": len(runs.user),
        "dropped_short": num_users - len(runs.user),
        "truncated": int((start > runs.begin).sum()),
        "events": int((runs.stop - start).sum()),
    }
    return SampleTable(
        user=runs.user,
        start=start,
        stop=runs.stop,
        num_candidates=np.zeros_like(start) if num_candidates is None else num_candidates,
        num_labels=num_labels,
        target=target,
        history_begin=runs.begin,
        report=report,
    )

"""Which users and events a split or a period holds."""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from hstu.base.errors import ConfigError, DataError
from hstu.base.hashing import hash_strings, random_bits
from hstu.base.times import as_date
from hstu.config.args import DatasetArgs, Task
from hstu.config.option import is_given, located
from hstu.data.store.layout import HeldOut
from hstu.data.store.parts import Values
from hstu.data.store.sequence_store import USER_FEATURE, SequenceStore

Split = Literal["train", "valid", "test", "all"]


@dataclass(frozen=True)
class Period:
    """The events of [since, until), in seconds since 1970, as a part to evaluate; None: no bound on this side."""

    since: int | None = None
    until: int | None = None
    first_only: bool = False
    """Only each user's first event of the period."""
    most: int | None = None
    """Draw samples with at most this many labels in total; None: all. Which ones depends on their newest events."""

    def __str__(self) -> str:
        bounds = (("since", self.since), ("until", self.until))
        shown = [f"{name} {as_date(time)}" for name, time in bounds if time is not None]
        drawn = [] if self.most is None else [f"at most {self.most:,}"]
        return " ".join([*drawn, "first events" if self.first_only else "events", *shown])

    def is_within(self, times: Values) -> np.ndarray:
        """Whether times, int64 [n], lie in the period: bool [n]."""
        after = True if self.since is None else times >= self.since
        return np.broadcast_to(after & (True if self.until is None else times < self.until), times.shape)

    def held_out(self, store: SequenceStore) -> tuple[np.ndarray, np.ndarray]:
        """(first, one past the last), int64 [U] each: the events of each user. Raises DataError without times."""
        if store.timestamp_feature is None:
            raise DataError(f"{store} has no times, so no period of it can be evaluated; evaluate a split")
        events = np.flatnonzero(self.is_within(store.sequence(store.timestamp_feature)))
        begin, bounds = np.array(store.offsets()[:-1]), np.searchsorted(events, store.offsets())
        count, (users,) = np.diff(bounds), np.nonzero(np.diff(bounds))
        begin[users] = events[bounds[users]]  # events are in time order within a user
        return begin, begin + (np.minimum(count, 1) if self.first_only else count)


@dataclass(frozen=True)
class Runs:
    """One run of events per user of the split, before truncation; int64."""

    user: np.ndarray
    begin: np.ndarray
    stop: np.ndarray

    def select(self, keep: np.ndarray) -> Self:
        """These runs; ``keep``: bool or int [n]."""
        return type(self)(self.user[keep], self.begin[keep], self.stop[keep])

    @property
    def lengths(self) -> np.ndarray:
        """Events of each run."""
        return self.stop - self.begin


def check_split(store: SequenceStore, args: DatasetArgs) -> None:
    """Raises ConfigError for options that contradict the data's split, leave a split empty or lack times."""
    timeless = [name for name in ("shuffle_ties", "same_second_targets") if store.timestamp_feature is None]
    text = f"needs times, and {store.path} has none; remove it, or preprocess the data with a time column"
    problems = [located(args, name, text) for name in timeless if is_given(args, name)]
    if args.shuffle_window_shards and not store.num_shards:
        text = f"needs a store in shards, and {store} has none; remove it, or preprocess the data with --shards N"
        problems.append(located(args, "shuffle_window_shards", text))
    ConfigError.raise_if(problems)
    if store.split is None:
        trained, validated = _users_before(store, args)
        if args.valid_fraction and not trained < validated < store.num_users:
            text = (
                f"of {store.num_users} users {trained} are trained on, which leaves {validated - trained} for valid "
                f"and {store.num_users - validated} for test; change it, or train_fraction, so that both have users"
            )
            raise ConfigError(located(args, "valid_fraction", text))
        return
    text = (
        f"has no effect, because the data says itself which events are train, valid and test (column {store.split!r}); "
        "remove it, or preprocess the data without --split"
    )
    options = ("split", "valid_items", "train_fraction", "valid_fraction", "eval_dataset_path")
    ConfigError.raise_if([located(args, option, text) for option in options if is_given(args, option)])


def check_requests(store: SequenceStore, args: DatasetArgs) -> None:
    """Raises ConfigError where the data lacks requests that options need, or these do not fit."""
    if args.candidates != "requests":
        return
    if not store.num_requests:
        text = f"{store} has no requests; preprocess the data with --requests FILE, or remove this"
        raise ConfigError([located(args, "candidates", text)])
    if store.split is not None:
        text = f"the split of the data (column {store.split!r}) is of events; preprocess the data without --split"
        raise ConfigError([located(args, "candidates", text)])
    largest = int(store.requests().sizes.max())
    if not args.max_num_candidates and largest >= args.max_sequence_length:
        text = (
            f"leaves no room for history beside the {largest} candidates of the largest request; raise it, or set "
            "max_num_candidates, which divides larger requests"
        )
        raise ConfigError([located(args, "max_sequence_length", text)])


def trained_events(
    store: SequenceStore, runs: Runs, args: DatasetArgs, task: Task, seed: int
) -> tuple[Runs, np.ndarray]:
    """(users to train on, one past the last event of each to train on)."""
    if store.split is not None:
        return runs, bounds_of_split(store, runs, "valid")[0]
    if args.split == "none":
        return runs, runs.stop
    if task == "retrieval":
        return runs, np.maximum(tested_events(store, runs, args) - args.valid_items, runs.begin)
    if args.split == "time":
        return runs, cut_events(store, args.train_fraction)
    runs = runs.select(users_of_split(store, args, "train", seed))
    return runs, runs.stop


def tested_events(store: SequenceStore, runs: Runs, args: DatasetArgs) -> np.ndarray:
    """int64 [U]: the event of each user that retrieval tests; the user's end if there is none."""
    return cut_events(store, args.train_fraction) if args.split == "time" else runs.stop - 1


def bounds_of_split(store: SequenceStore, runs: Runs, split: HeldOut | Period) -> tuple[np.ndarray, np.ndarray]:
    """(first, one past the last), int64 [U] each: the events of a split of the data, or of a period."""
    begin, stop = split.held_out(store) if isinstance(split, Period) else store.held_out(split)
    is_within = (runs.begin <= begin) & (begin <= stop) & (stop <= runs.stop)
    require_undamaged(store, bool(is_within.all()), "bounds of its splits")
    return begin, stop


def user_keys(store: SequenceStore) -> np.ndarray:
    """Raw ids of the users, int64 [U], or hashes of them, uint64 [U]."""
    raw_ids = store.raw_ids(USER_FEATURE)
    return raw_ids if raw_ids.dtype == np.int64 else hash_strings(raw_ids)


def users_of_split(store: SequenceStore, args: DatasetArgs, split: Split, seed: int) -> np.ndarray:
    """bool [U]. Only raw ids decide, so the order of users and files has no influence."""
    trained, validated = _users_before(store, args)
    begin, stop = {"train": (0, trained), "valid": (trained, validated), "test": (validated, None)}[split]
    if not args.valid_fraction and split != "train":
        begin, stop = trained, None
    chosen = np.zeros(store.num_users, dtype=bool)
    chosen[np.argsort(random_bits(seed, user_keys(store)))[begin:stop]] = True
    return chosen


def _users_before(store: SequenceStore, args: DatasetArgs) -> tuple[int, int]:
    """Number of users in "train", and in "train" and "valid" together."""
    validated = round((args.train_fraction + args.valid_fraction) * store.num_users)
    return round(args.train_fraction * store.num_users), validated


def cut_events(store: SequenceStore, fraction: float) -> np.ndarray:
    """int64 [U]: each user's first event at or after the cut in time, or the end of the user's events."""
    if store.timestamp_feature is None:
        raise ConfigError('DatasetArgs.split = "time" needs timestamps, and the data has none; use another split')
    times = store.sequence(store.timestamp_feature)
    middle, ordered = min(int(fraction * len(times)), len(times) - 1), np.array(times)
    ordered.partition(middle)
    cut = ordered[middle]
    # Events are in time order within a user, so the later events are the last ones.
    num_later = np.diff(np.searchsorted(np.flatnonzero(times >= cut), store.offsets()))
    return np.asarray(store.offsets()[1:] - num_later, dtype=np.int64)


def require_undamaged(store: SequenceStore, is_right: bool, what: str) -> None:
    """Raise DataError unless ``is_right``."""
    if not is_right:
        raise DataError(f"{store}: the {what} are damaged; preprocess the data again")

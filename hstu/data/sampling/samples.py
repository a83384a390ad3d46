"""From users' histories to samples, which are runs of a user's events: splits, truncation, candidates and windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from hstu.base.errors import ConfigError, DataError
from hstu.base.hashing import hash_strings, random_bits
from hstu.base.times import as_date
from hstu.config.args import Args, DatasetArgs, Task
from hstu.config.option import is_given, located
from hstu.data.batches.jagged import run_indices
from hstu.data.store.layout import HeldOut
from hstu.data.store.sequence_store import USER_FEATURE, Requests, SequenceStore

Split = Literal["train", "valid", "test", "all"]


@dataclass(frozen=True)
class Period:
    """The events of [since, until), in seconds since 1970, as a part to evaluate; None: no bound on this side."""

    since: int | None = None
    until: int | None = None
    first_only: bool = False
    """Only each user's first event of the period."""

    def __str__(self) -> str:
        bounds = (("since", self.since), ("until", self.until))
        shown = [f"{name} {as_date(time)}" for name, time in bounds if time is not None]
        return " ".join(["first events" if self.first_only else "events", *shown])

    def is_within(self, times: np.ndarray) -> np.ndarray:
        """Whether times, int64 [n], lie in the period: bool [n]."""
        after = True if self.since is None else times >= self.since
        return np.broadcast_to(after & (True if self.until is None else times < self.until), times.shape)

    def held_out(self, store: SequenceStore) -> tuple[np.ndarray, np.ndarray]:
        """(first, one past the last), int64 [U] each: the events of each user. Raises DataError without times."""
        if store.timestamp_feature is None:
            raise DataError(f"{store.path} has no times, so no period of it can be evaluated; evaluate a split")
        events = np.flatnonzero(self.is_within(store.sequence(store.timestamp_feature)))
        begin, bounds = np.array(store.offsets()[:-1]), np.searchsorted(events, store.offsets())
        count, (users,) = np.diff(bounds), np.nonzero(np.diff(bounds))
        begin[users] = events[bounds[users]]  # events are in time order within a user
        return begin, begin + (np.minimum(count, 1) if self.first_only else count)


@dataclass(frozen=True)
class SampleTable:
    """S samples in the store's order of users, as indices into the store's flat arrays; int32 or int64 [S]."""

    user: np.ndarray
    """Row of the user in the store."""
    lengths: np.ndarray
    """Items of the sample, candidates included, after truncation to the newest events."""
    stop: np.ndarray
    """One past the last event of the sample."""
    num_candidates: np.ndarray
    """Number of candidates: the newest events of the sample or, with ``request``, items that follow the events."""
    num_labels: np.ndarray
    """Number of labelled items, which are the newest of the sample."""
    target: np.ndarray | None
    """The held-out event, in retrieval evaluation."""
    history_begin: np.ndarray
    """First event of the user; the events [history_begin, target) are seen."""
    request: np.ndarray | None = None
    """Row of the request whose candidates follow the events. None: candidates are events."""
    first_candidate: np.ndarray | None = None
    """With ``request``: index of the sample's first candidate among the store's candidates."""
    report: dict[str, int] = field(default_factory=dict)
    """Counts: users of the split, samples, users (or targets) without enough history, users whose oldest events are in
    no sample, users in random windows, events of all samples, and targets of the same second as the event before. Of a
    phase: new events, and labels."""

    def __len__(self) -> int:
        return len(self.user)

    @property
    def start(self) -> np.ndarray:
        """First event of each sample."""
        return self.stop - self.lengths + (0 if self.request is None else self.num_candidates)

    @property
    def newest_labels(self) -> np.ndarray:
        """The target or, in ranking, the newest label of each sample: an event or, with ``request``, a candidate."""
        if self.target is not None:
            return self.target
        return (self.stop if self.first_candidate is None else self.first_candidate + self.num_candidates) - 1

    def take(self, rows: np.ndarray) -> SampleTable:
        """These samples, in int64."""
        return self._map(lambda values: values[rows].astype(np.int64))

    def compact(self) -> SampleTable:
        """The same samples, in int32 where all values fit."""
        return self._map(lambda values: values.astype(np.int32 if values.max(initial=0) < 2**31 else np.int64))

    def _map(self, change: Callable[[np.ndarray], np.ndarray]) -> SampleTable:
        arrays = {name: change(value) for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **arrays)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Runs:
    """One run of events per user of the split, before truncation; int64."""

    user: np.ndarray
    begin: np.ndarray
    stop: np.ndarray

    def select(self, keep: np.ndarray) -> _Runs:
        return _Runs(self.user[keep], self.begin[keep], self.stop[keep])

    @property
    def lengths(self) -> np.ndarray:
        return self.stop - self.begin


def build_samples(
    store: SequenceStore, args: DatasetArgs, task: Task, split: Split | Period, seed: int, first_segment: int = 0
) -> SampleTable:
    """The samples of one split. Users with too few events for a sample are dropped and counted in the report.

    leave_one_out: training leaves out the last 1 + valid_items events of each user. "test" predicts the last event,
    "valid" the one before it (with valid_items = 0 also the last). Training needs two events of a user, evaluation
    one event before the target. With a split in time, each user's first event after the cut is in the place of the last
    one, and users without one are not in "test".

    user_holdout: a hash of raw id and ``seed`` orders the users. The first train_fraction of them are trained on, the
    next valid_fraction are "valid", the others "test"; with valid_fraction = 0 the others are both. time: training
    uses the events before a cut in time, train_fraction of all events. "valid" and "test" are the users with later
    events, and only later events are labelled. Both splits need one event more than candidates.

    A split that the data defines (SequenceStore.split) replaces these. Training uses the events before the first valid
    or test event. Each event of "valid" and "test" is a retrieval target, or a label of one ranking sample. A Period is
    evaluated in the same way, whatever is trained on.

    none: training uses all events. "all": every user, unsplit (ranking on a second store). With window_stride, a long
    training history gives several samples. With candidates = "requests", a sample is a request.

    ``first_segment``: above 0, training labels only the events of the store's segments from this one on that the split
    gives to training, each once, after as much history as fits.

    Raises ConfigError for a split in time of data without times, for an evaluation split of "none", and for new
    requests; DataError for damaged offsets. ``args`` obeys the rules of hstu/config/rules.
    """
    offsets = np.asarray(store.offsets(), dtype=np.int64)
    _require(store, bool((np.diff(offsets) >= 0).all()), "offsets of the users")
    runs = _Runs(np.arange(store.num_users, dtype=np.int64), offsets[:-1], offsets[1:])
    if args.candidates == "requests":
        if first_segment:
            text = "labels requests, and new events are none; set TrainerArgs.continue_on = 'all'"
            raise ConfigError(located(args, "candidates", text))
        return _of_requests(store, args, split, seed)
    if split == "train":
        trained, stop = _trained(store, runs, args, task, seed)
        if first_segment:
            return _of_new_events(store, trained, stop, args, task, first_segment)
        return _training(trained, stop, args, task)
    if isinstance(split, Period) or (store.split is not None and split != "all"):
        return _of_held_out(store, runs, args, task, split)
    if args.split == "none" and split != "all":
        raise ConfigError(located(args, "split", "holds nothing out, so there is nothing to evaluate"))
    if task == "retrieval":
        target = _tested(store, runs, args) - (args.valid_items if split == "valid" else 0)
        return _with_target(store, runs.select(target < runs.stop), target[target < runs.stop], args)
    if split == "all":
        return _ranking_samples(runs, runs.lengths, args)
    if args.split != "time":
        runs = runs.select(_users_of_split(store, args, split, seed))
        return _ranking_samples(runs, runs.lengths, args)
    cut = _cut_events(store, args.train_fraction)
    return _ranking_samples(runs.select(runs.stop > cut), (runs.stop - cut)[runs.stop > cut], args)


def _trained(store: SequenceStore, runs: _Runs, args: DatasetArgs, task: Task, seed: int) -> tuple[_Runs, np.ndarray]:
    """(users to train on, one past the last event of each to train on)."""
    if store.split is not None:
        return runs, _bounds_of_split(store, runs, "valid")[0]
    if args.split == "none":
        return runs, runs.stop
    if task == "retrieval":
        return runs, np.maximum(_tested(store, runs, args) - args.valid_items, runs.begin)
    if args.split == "time":
        return runs, _cut_events(store, args.train_fraction)
    runs = runs.select(_users_of_split(store, args, "train", seed))
    return runs, runs.stop


def _tested(store: SequenceStore, runs: _Runs, args: DatasetArgs) -> np.ndarray:
    """int64 [U]: the event of each user that retrieval tests; the user's end if there is none."""
    return _cut_events(store, args.train_fraction) if args.split == "time" else runs.stop - 1


def _require(store: SequenceStore, is_right: bool, what: str) -> None:
    if not is_right:
        raise DataError(f"{store.path}: the {what} are damaged; preprocess the data again")


def require_requests(store: SequenceStore, args: Args, option: str) -> None:
    """Raises ConfigError where the data lacks the requests that an option needs."""
    if not store.num_requests:
        text = f"{store.path} has no requests; preprocess the data with --requests FILE, or remove this"
        raise ConfigError([located(args, option, text)])


def check_requests(store: SequenceStore, args: DatasetArgs) -> None:
    """Raises ConfigError where the data lacks requests that options need, or these do not fit."""
    if args.candidates != "requests":
        return
    require_requests(store, args, "candidates")
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


def check_split(store: SequenceStore, args: DatasetArgs) -> None:
    """Raises ConfigError for options that contradict the data's split, leave a split empty or lack times."""
    for name in ("shuffle_ties", "same_second_targets"):
        if is_given(args, name) and store.timestamp_feature is None:
            text = f"needs times, and {store.path} has none; remove it, or preprocess the data with a time column"
            raise ConfigError([located(args, name, text)])
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
    if problems := [located(args, option, text) for option in options if is_given(args, option)]:
        raise ConfigError(problems)


def _training(runs: _Runs, stop: np.ndarray, args: DatasetArgs, task: Task) -> SampleTable:
    """Training samples of the events before ``stop``. All events are labels; in retrieval, all but a history's first.
    Random windows begin as the newest windows, which window_starts moves in each epoch. A stride gives each user's
    newest window and older ones, so that every event is a label once, after as much history as fits."""
    num_users, unlabelled = len(runs.user), 1 if task == "retrieval" else 0
    runs = _Runs(runs.user, runs.begin, stop).select(stop - runs.begin > unlabelled)
    if task == "retrieval":
        samples = _table(runs, args, num_users, np.minimum(runs.lengths, args.max_sequence_length) - 1)
    else:
        samples = _ranking_samples(runs, runs.lengths, args)
    if args.has_random_windows:
        long = int((samples.start > samples.history_begin).sum())
        return replace(samples, report=samples.report | {"truncated": 0, "in random windows": long})
    if not isinstance(args.window_stride, int):
        return samples
    usable = _Runs(samples.user, samples.history_begin, samples.stop)
    windows = _windows(usable, usable.begin + unlabelled, args, args.window_stride, is_training=True)
    counts = {"samples": len(windows), "truncated": 0, "events": windows.report["events"]}
    return replace(windows, report=samples.report | counts)


def _of_new_events(
    store: SequenceStore, runs: _Runs, stop: np.ndarray, args: DatasetArgs, task: Task, first_segment: int
) -> SampleTable:
    """Training samples that label the new events before ``stop``. Late events lie between older ones: each maximal run
    of new events of a user is cut into windows of its own. In retrieval, and among candidates, a user's first event
    cannot be a label."""
    segments, most = store.segments(), args.max_num_candidates
    unlabelled = int(task == "retrieval" or most > 0)
    is_new = np.zeros(store.num_events + 1, dtype=bool)
    if segments is not None:
        np.greater_equal(segments, first_segment, out=is_new[:-1])
    num_new, changes = int(is_new.sum()), np.zeros(len(is_new), dtype=np.int8)
    np.add.at(changes, np.minimum(runs.begin + unlabelled, stop), 1)
    np.add.at(changes, stop, -1)
    is_new &= changes.cumsum(dtype=np.int8) > 0
    begins_run = np.append(True, ~is_new[:-1])
    begins_run[runs.begin] = True
    begin = np.flatnonzero(is_new & begins_run)
    after = np.flatnonzero(is_new[:-1] & (~is_new | begins_run)[1:]) + 1
    rows = np.searchsorted(runs.begin, begin, side="right") - 1
    length = args.max_sequence_length
    step = args.window_stride if isinstance(args.window_stride, int) else length // 2
    step = most or max(min(step, length - unlabelled), 1)
    samples = _windows(_Runs(runs.user[rows], runs.begin[rows], after), begin, args, step, is_training=False)
    users = len(np.unique(samples.user))
    counts = {"users": users, "new_events": num_new, "labels": int(samples.num_labels.sum())}
    return replace(samples, report=samples.report | counts)


def _with_target(store: SequenceStore, runs: _Runs, target: np.ndarray, args: DatasetArgs) -> SampleTable:
    """Evaluation samples, one per run: the history before ``target``, of at least one event."""
    kept = _Runs(runs.user, runs.begin, target).select(target > runs.begin)
    samples = _table(kept, args, len(runs.user), np.zeros_like(kept.user), target=kept.stop)
    if args.same_second_targets:
        return samples
    later = np.flatnonzero(store.gaps(kept.stop) > 0)
    report = samples.report | {"samples": len(later), "same_second": len(samples) - len(later)}
    return replace(samples.take(later), report=report)


def _users_of_split(store: SequenceStore, args: DatasetArgs, split: Split, seed: int) -> np.ndarray:
    """bool [U]. Only raw ids decide, so the order of users and files has no influence."""
    raw_ids = store.raw_ids(USER_FEATURE)
    keys = raw_ids if raw_ids.dtype == np.int64 else hash_strings(raw_ids)
    trained, validated = _users_before(store, args)
    begin, stop = {"train": (0, trained), "valid": (trained, validated), "test": (validated, None)}[split]
    if not args.valid_fraction and split != "train":
        begin, stop = trained, None
    chosen = np.zeros(store.num_users, dtype=bool)
    chosen[np.argsort(random_bits(seed, keys))[begin:stop]] = True
    return chosen


def _users_before(store: SequenceStore, args: DatasetArgs) -> tuple[int, int]:
    """Number of users in "train", and in "train" and "valid" together."""
    validated = round((args.train_fraction + args.valid_fraction) * store.num_users)
    return round(args.train_fraction * store.num_users), validated


def _of_requests(store: SequenceStore, args: DatasetArgs, split: Split | Period, seed: int) -> SampleTable:
    """The requests of a split, in parts of at most max_num_candidates. With "time", train_fraction precede the cut."""
    requests, offsets = store.requests(), np.asarray(store.offsets())
    ends = requests.history_ends
    is_within = (offsets[requests.users] < ends) & (ends <= offsets[requests.users + 1])
    _require(store, bool(is_within.all() and (requests.sizes > 0).all()), "requests")
    if isinstance(split, Period):
        chosen = np.flatnonzero(split.is_within(requests.times))
        if split.first_only:
            chosen = chosen[np.unique(requests.users[chosen], return_index=True)[1]]
    elif split == "all" or args.split == "none":
        chosen = np.arange(len(requests))
    elif args.split != "time":
        chosen = np.flatnonzero(_users_of_split(store, args, split, seed)[requests.users])
    else:
        middle = min(int(args.train_fraction * len(requests)), len(requests) - 1)
        in_training = requests.times < np.partition(requests.times, middle)[middle]
        chosen = np.flatnonzero(in_training == (split == "train"))
    sizes = requests.sizes[chosen]
    parts = -(-sizes // (args.max_num_candidates or sizes))
    room = args.max_sequence_length - (args.max_num_candidates or -(-sizes // parts))
    samples = samples_of_requests(requests, offsets, chosen, parts, np.broadcast_to(room, sizes.shape))
    report = {
        "users": len(np.unique(samples.user)),
        "requests": len(chosen),
        "samples": len(samples),
        "truncated": int((samples.start > samples.history_begin).sum()),
        "candidates": int(sizes.sum()),
    }
    return replace(samples, report=report)


def samples_of_requests(
    requests: Requests, offsets: np.ndarray, chosen: np.ndarray, parts: np.ndarray, room: np.ndarray
) -> SampleTable:
    """Samples of n requests ``chosen``, each divided into ``parts``, int64 [n], of about equally many candidates. All
    parts of a request have the same history: the newest ``room`` events before it, int64 [n]. ``offsets``: the
    events of each user, int64 [U + 1]."""
    rows, part = run_indices(parts)
    request, sizes = chosen[rows], requests.sizes[chosen][rows]
    first, after = (sizes * (part + step) // parts[rows] for step in (0, 1))
    begin, stop = offsets[requests.users[request]], requests.history_ends[request]
    return SampleTable(
        user=requests.users[request],
        lengths=np.minimum(stop - begin, room[rows]) + after - first,
        stop=stop,
        num_candidates=after - first,
        num_labels=after - first,
        target=None,
        history_begin=begin,
        request=request,
        first_candidate=requests.offsets[request] + first,
    )


def _cut_events(store: SequenceStore, fraction: float) -> np.ndarray:
    """int64 [U]: each user's first event at or after the cut in time, or the end of the user's events."""
    if store.timestamp_feature is None:
        raise ConfigError('DatasetArgs.split = "time" needs timestamps, and the data has none; use another split')
    times = store.sequence(store.timestamp_feature)
    middle = min(int(fraction * len(times)), len(times) - 1)
    cut = np.partition(times, middle)[middle]
    # Events are in time order within a user, so the later events are the last ones.
    num_later = np.diff(np.searchsorted(np.flatnonzero(times >= cut), store.offsets()))
    return np.asarray(store.offsets()[1:] - num_later, dtype=np.int64)


def _bounds_of_split(store: SequenceStore, runs: _Runs, split: HeldOut | Period) -> tuple[np.ndarray, np.ndarray]:
    begin, stop = split.held_out(store) if isinstance(split, Period) else store.held_out(split)
    is_within = (runs.begin <= begin) & (begin <= stop) & (stop <= runs.stop)
    _require(store, bool(is_within.all()), "bounds of its splits")
    return begin, stop


def _of_held_out(
    store: SequenceStore, runs: _Runs, args: DatasetArgs, task: Task, split: HeldOut | Period
) -> SampleTable:
    begin, stop = _bounds_of_split(store, runs, split)
    if task == "ranking":  # a truncated sample labels at most half of its length, so that each label has a history
        labelled = args.max_num_candidates or max(args.max_sequence_length // 2, 1)
        samples = _windows(_Runs(runs.user, runs.begin, stop), begin, args, labelled, is_training=False)
    else:
        rows, place = run_indices(stop - begin)
        samples = _with_target(store, runs.select(rows), begin[rows] + place, args)
    counts = {"users": int((stop > begin).sum()), "held_out": int((stop - begin).sum())}
    return replace(samples, report=samples.report | counts)


def _windows(runs: _Runs, begin: np.ndarray, args: DatasetArgs, step: int, is_training: bool) -> SampleTable:
    """Several samples per run, the newest first: sample k ends k * ``step`` events before the run does. Each sample
    labels its newest ``step`` events, and the oldest sample all events from ``begin`` on, so each event is a label
    once. With max_num_candidates, training labels that many candidates in each window."""
    length, most = args.max_sequence_length, args.max_num_candidates
    of_labels = np.maximum(-(-(runs.stop - begin) // step) - 1, 0)
    older = -(-np.maximum(runs.lengths - length, 0) // step)
    if not is_training:  # without candidates, a sample that starts at the first event has all the history of its labels
        older = of_labels if most else np.minimum(of_labels, older)
    rows, back = run_indices(np.where(runs.stop > begin, 1 + older, 0))
    history_begin, ends = runs.begin[rows], runs.stop[rows] - back * step
    unlabelled = (begin - runs.begin)[rows] if is_training else 0
    num_labels = np.where(back == older[rows], ends - begin[rows], np.minimum(step, length - unlabelled))
    if most:  # a candidate needs an event before it
        num_labels = np.minimum(most if is_training else num_labels, ends - history_begin - 1)
    kept = num_labels > 0
    candidates = num_labels if most else np.zeros_like(num_labels)
    cut = _Runs(runs.user[rows], history_begin, ends).select(kept)
    return _table(cut, args, len(rows), num_labels[kept], candidates[kept])


def _ranking_samples(runs: _Runs, num_later: np.ndarray, args: DatasetArgs) -> SampleTable:
    """Labels the candidates or, without candidates, all events; in both cases only the newest ``num_later`` events."""
    candidates = np.minimum(num_later, args.max_num_candidates)
    labels = candidates if args.max_num_candidates else np.minimum(num_later, args.max_sequence_length)
    # Users with no more events than candidates have no history and are dropped.
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
    shown = np.zeros_like(runs.begin) if num_candidates is None else num_candidates
    # Room for max_num_candidates stays free, so that what a candidate sees does not depend on how many are beside it.
    length = args.max_sequence_length - args.max_num_candidates + shown
    lengths = np.minimum(runs.lengths, length)
    report = {
        "users": num_users,
        "samples": len(runs.user),
        "dropped_short": num_users - len(runs.user),
        "truncated": int((lengths < runs.lengths).sum()),
        "events": int(lengths.sum()),
    }
    return SampleTable(
        user=runs.user,
        lengths=lengths,
        stop=runs.stop,
        num_candidates=shown,
        num_labels=num_labels,
        target=target,
        history_begin=runs.begin,
        report=report,
    )

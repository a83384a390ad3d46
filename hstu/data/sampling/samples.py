"""From users' histories to samples, which are runs of a user's events: truncation, candidates and windows."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from hstu.base.errors import ConfigError
from hstu.base.hashing import random_bits
from hstu.config.args import DatasetArgs, Task
from hstu.config.option import located
from hstu.data.batches.jagged import run_indices
from hstu.data.sampling import splits
from hstu.data.sampling.splits import Period, Runs, Split
from hstu.data.store.layout import HeldOut
from hstu.data.store.sequence_store import Requests, SequenceStore

_SEED_OF_DRAWS = 0


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
    phase: new events, and labels. Of a period that draws samples: labels that were not drawn; the other counts are of
    all its samples."""

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

    def counted(self, **counts: int) -> Self:
        """These samples with further counts in their report."""
        return replace(self, report=self.report | counts)

    def take(self, rows: np.ndarray) -> Self:
        """These samples, in int64."""
        return self._map(lambda values: values[rows].astype(np.int64))

    def compact(self) -> Self:
        """The same samples, in int32 where all values fit."""
        return self._map(lambda values: values.astype(np.int32 if values.max(initial=0) < 2**31 else np.int64))

    def _map(self, change: Callable[[np.ndarray], np.ndarray]) -> Self:
        arrays = {name: change(value) for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **arrays)  # type: ignore[arg-type]


def build_samples(
    store: SequenceStore, args: DatasetArgs, task: Task, split: Split | Period, seed: int, first_segment: int = 0
) -> SampleTable:
    """The samples of one split, as DatasetArgs.split describes it. "all": every user, unsplit (ranking on a second
    store). Users with too few events for a sample are dropped and counted in the report: training of retrieval needs
    two events, its evaluation one before the target, and ranking one more than candidates.

    A split that the data defines (SequenceStore.split) replaces that of the options. Training uses the events before
    the first valid or test event. Each event of "valid" and "test" is a retrieval target, or a label of one ranking
    sample. A Period is evaluated in the same way, whatever is trained on, with as many samples as it draws.

    ``first_segment``: above 0, training labels only the events of the store's segments from this one on that the split
    gives to training, each once, after as much history as fits.

    Raises ConfigError for a split in time of data without times, for an evaluation split of "none", and for new
    requests; DataError for damaged offsets. ``args`` obeys the rules of hstu/config/rules.
    """
    if isinstance(split, Period) and split.most is not None:
        return _drawn(store, build_samples(store, args, task, replace(split, most=None), seed), split)
    offsets = np.asarray(store.offsets(), dtype=np.int64)
    splits.require_undamaged(store, bool((np.diff(offsets) >= 0).all()), "offsets of the users")
    runs = Runs(np.arange(store.num_users, dtype=np.int64), offsets[:-1], offsets[1:])
    if args.candidates == "requests":
        if first_segment:
            text = "labels requests, and new events are none; set TrainerArgs.continue_on = 'all'"
            raise ConfigError(located(args, "candidates", text))
        return _of_requests(store, args, split, seed)
    if split == "train":
        trained, stop = splits.trained_events(store, runs, args, task, seed)
        if first_segment:
            return _of_new_events(store, trained, stop, args, task, first_segment)
        return _training(trained, stop, args, task)
    if isinstance(split, Period) or (store.split is not None and split != "all"):
        return _of_held_out(store, runs, args, task, split)
    if args.split == "none" and split != "all":
        raise ConfigError(located(args, "split", "holds nothing out, so there is nothing to evaluate"))
    if task == "retrieval":
        target = splits.tested_events(store, runs, args) - (args.valid_items if split == "valid" else 0)
        return _with_target(store, runs.select(target < runs.stop), target[target < runs.stop], args)
    if split != "all" and args.split == "time":
        later = runs.stop - splits.cut_events(store, args.train_fraction)
        return _ranking_samples(runs.select(later > 0), later[later > 0], args)
    if split != "all":
        runs = runs.select(splits.users_of_split(store, args, split, seed))
    return _ranking_samples(runs, runs.lengths, args)


def _training(runs: Runs, stop: np.ndarray, args: DatasetArgs, task: Task) -> SampleTable:
    """Training samples of the events before ``stop``. All events are labels; in retrieval, all but a history's first.
    Random windows begin as the newest windows, which window_starts moves in each epoch. A stride gives each user's
    newest window and older ones, so that every event is a label once, after as much history as fits."""
    num_users, unlabelled = len(runs.user), 1 if task == "retrieval" else 0
    runs = Runs(runs.user, runs.begin, stop).select(stop - runs.begin > unlabelled)
    if task == "retrieval":
        samples = _table(runs, args, num_users, np.minimum(runs.lengths, args.max_sequence_length) - 1)
    else:
        samples = _ranking_samples(runs, runs.lengths, args)
    if args.has_random_windows:
        long = int((samples.start > samples.history_begin).sum())
        return samples.counted(**{"truncated": 0, "in random windows": long})
    if not isinstance(args.window_stride, int):
        return samples
    usable = Runs(samples.user, samples.history_begin, samples.stop)
    windows = _windows(usable, usable.begin + unlabelled, args, args.window_stride, is_training=True)
    counts = samples.report | {"samples": len(windows), "truncated": 0, "events": windows.report["events"]}
    return windows.counted(**counts)


def _of_new_events(
    store: SequenceStore, runs: Runs, stop: np.ndarray, args: DatasetArgs, task: Task, first_segment: int
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
    samples = _windows(Runs(runs.user[rows], runs.begin[rows], after), begin, args, step, is_training=False)
    users, labels = len(np.unique(samples.user)), int(samples.num_labels.sum())
    return samples.counted(users=users, new_events=num_new, labels=labels)


def _with_target(store: SequenceStore, runs: Runs, target: np.ndarray, args: DatasetArgs) -> SampleTable:
    """Evaluation samples, one per run: the history before ``target``, of at least one event."""
    kept = Runs(runs.user, runs.begin, target).select(target > runs.begin)
    samples = _table(kept, args, len(runs.user), np.zeros_like(kept.user), target=kept.stop)
    if args.same_second_targets:
        return samples
    later = np.flatnonzero(store.gaps(kept.stop) > 0)
    return samples.take(later).counted(samples=len(later), same_second=len(samples) - len(later))


def _of_requests(store: SequenceStore, args: DatasetArgs, split: Split | Period, seed: int) -> SampleTable:
    """The requests of a split, in parts of at most max_num_candidates. With "time", train_fraction precede the cut."""
    requests, offsets = store.requests(), np.asarray(store.offsets())
    ends = requests.history_ends
    is_within = (offsets[requests.users] < ends) & (ends <= offsets[requests.users + 1])
    splits.require_undamaged(store, bool(is_within.all() and (requests.sizes > 0).all()), "requests")
    if isinstance(split, Period):
        chosen = np.flatnonzero(split.is_within(requests.times))
        if split.first_only:
            chosen = chosen[np.unique(requests.users[chosen], return_index=True)[1]]
    elif split == "all" or args.split == "none":
        chosen = np.arange(len(requests))
    elif args.split != "time":
        chosen = np.flatnonzero(splits.users_of_split(store, args, split, seed)[requests.users])
    else:
        middle = min(int(args.train_fraction * len(requests)), len(requests) - 1)
        in_training = requests.times < np.partition(requests.times, middle)[middle]
        chosen = np.flatnonzero(in_training == (split == "train"))
    sizes = requests.sizes[chosen]
    parts = -(-sizes // (args.max_num_candidates or sizes))
    room = args.max_sequence_length - (args.max_num_candidates or -(-sizes // parts))
    samples = samples_of_requests(requests, offsets, chosen, parts, np.broadcast_to(room, sizes.shape))
    users, truncated = len(np.unique(samples.user)), int((samples.start > samples.history_begin).sum())
    counts = {"users": users, "requests": len(chosen), "samples": len(samples), "truncated": truncated}
    return samples.counted(**counts, candidates=int(sizes.sum()))


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


def _drawn(store: SequenceStore, samples: SampleTable, period: Period) -> SampleTable:
    """The samples of a period that it draws, by a hash of their newest labels, so that any model gets the same."""
    newest, is_event = samples.newest_labels, samples.first_candidate is None
    items = store.sequence(store.item_feature) if is_event else store.candidates(store.item_feature)
    times = store.sequence(str(store.timestamp_feature))[newest] if is_event else store.candidate_times(newest)[0]
    labels = np.ones_like(newest) if samples.target is not None else samples.num_labels
    users = splits.user_keys(store)[samples.user]
    order = np.argsort(random_bits(_SEED_OF_DRAWS, users, items[newest], times), kind="stable")
    rows = np.sort(order[labels[order].cumsum() <= (period.most or 0)])
    return samples.take(rows).counted(samples=len(rows), not_drawn=int(labels.sum() - labels[rows].sum()))


def _of_held_out(
    store: SequenceStore, runs: Runs, args: DatasetArgs, task: Task, split: HeldOut | Period
) -> SampleTable:
    begin, stop = splits.bounds_of_split(store, runs, split)
    if task == "ranking":  # a truncated sample labels at most half of its length, so that each label has a history
        labelled = args.max_num_candidates or max(args.max_sequence_length // 2, 1)
        samples = _windows(Runs(runs.user, runs.begin, stop), begin, args, labelled, is_training=False)
    else:
        rows, place = run_indices(stop - begin)
        samples = _with_target(store, runs.select(rows), begin[rows] + place, args)
    return samples.counted(users=int((stop > begin).sum()), held_out=int((stop - begin).sum()))


def _windows(runs: Runs, begin: np.ndarray, args: DatasetArgs, step: int, is_training: bool) -> SampleTable:
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
    cut = Runs(runs.user[rows], history_begin, ends).select(kept)
    return _table(cut, args, len(rows), num_labels[kept], candidates[kept])


def _ranking_samples(runs: Runs, num_later: np.ndarray, args: DatasetArgs) -> SampleTable:
    """Labels the candidates or, without candidates, all events; in both cases only the newest ``num_later`` events."""
    candidates = np.minimum(num_later, args.max_num_candidates)
    labels = candidates if args.max_num_candidates else np.minimum(num_later, args.max_sequence_length)
    # Users with no more events than candidates have no history and are dropped.
    usable = runs.lengths >= 1 + candidates
    return _table(runs.select(usable), args, len(runs.user), labels[usable], candidates[usable])


def _table(
    runs: Runs,
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
    samples = SampleTable(runs.user, lengths, runs.stop, shown, num_labels, target, history_begin=runs.begin)
    counts = {"users": num_users, "samples": len(samples), "dropped_short": num_users - len(samples)}
    return samples.counted(**counts, truncated=int((lengths < runs.lengths).sum()), events=int(lengths.sum()))

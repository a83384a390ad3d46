"""Options of the dataset, its split and its samples, and of random data for measuring speed."""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

from hstu.config.args.embedding import EmbeddingArgs, NamedFeaturesArgs
from hstu.config.option import Args, having, not_having, option

SPLITS = {"retrieval": ("leave_one_out", "time", "none"), "ranking": ("user_holdout", "time", "none")}
"""Task → allowed splits, the default first."""
HOLDS_OUT_USERS = having("task", "ranking", why="retrieval holds out events of every user")
SCORES_CANDIDATES = having("task", "ranking", why="retrieval scores the whole corpus", strict=True)
ONE_HISTORY = {"candidates": "a request has one history, which ends where the request is"}


class AnyDatasetArgs(Args):
    """What stored and random data have in common."""

    action_feature_name: Optional[str] = option(None, changes="tensors")
    """The action feature. None: the action of the store, if it has one; none in random data. "", for stored data: no
    action, sequences of items only (retrieval)."""
    max_num_candidates: int = option(0, changes="training", minimum=0, needs=SCORES_CANDIDATES)
    """Ranking: number of candidates of a sample. 0: none, every item is scored. With candidates = "requests", a request
    that has more is divided evenly into several samples with the same history, and 0 means no limit: a request with
    more candidates then has less history, so that a score depends on how many stand beside."""

    @property
    def has_candidates(self) -> bool:
        """Whether candidates alone are labelled."""
        return self.max_num_candidates > 0


class DatasetArgs(AnyDatasetArgs):
    """The dataset, its split, and how the history of a user becomes samples."""

    dataset_name: str = option(changes="tensors", not_empty=True)
    """A built-in dataset such as ml-1m or kuairand-1k, whose tables are predefined (docs/datasets.md lists them), or
    any other name for your own data in the sequence format, with its EmbeddingArgs in the gin file."""
    max_sequence_length: int = option(
        changes="tensors", minimum=1, aliases={"max_history_seqlen": "max_num_candidates"}
    )
    """Number of newest items kept of a user, candidates included. Gin files may give max_history_seqlen instead,
    which counts the history without candidates: max_sequence_length = max_history_seqlen + max_num_candidates.
    Room for max_num_candidates stays free where a sample has fewer."""
    dataset_path: Optional[str] = option(None, changes="tensors")
    """Directory of the preprocessed data, or its URL; or of a lake (docs/data_at_scale.md). None:
    tmp_data/<dataset_name>."""
    cache_dir: Optional[str] = option(None, changes="speed", not_empty=True)
    """Local directory for files of URLs and arrays of lakes, which the processes of a host share. None: hstu/remote in
    XDG_CACHE_HOME or ~/.cache."""
    cache_gb: float = option(100.0, changes="speed", above=0)
    """GB (10^9 bytes) in cache_dir at most. Files that were used longest ago are removed for others. Checkpoints that
    the run saves there do not count."""
    candidates: str = option("tail", changes="training", choices=("tail", "requests"), needs=SCORES_CANDIDATES)
    """Ranking: what is scored without attending to each other. tail: the newest items of a user, max_num_candidates of
    them. requests: what was shown to a user in each request of data preprocessed with --requests, after the newest
    items before the request."""
    window_stride: Optional[int | str] = option(
        None, changes="training", minimum=1, words=("random",), excludes=ONE_HISTORY
    )
    """Training: cut a history longer than max_sequence_length into windows of that length, each this many items before
    the next newer one. A window is labelled on its newest window_stride items (or max_num_candidates), the oldest one
    on all its items. "random": take one window of that length in each epoch, at random; all its items are labelled, or
    the newest max_num_candidates. None: use only the newest items. A phase of new events (TrainerArgs.continue_on) has
    windows of its own: their labels are at most window_stride new items, else half of max_sequence_length."""
    query_time: str = option("request", changes="training", choices=("request", "last_event", "either"))
    """What finds the next item, with a relative bias: from which time it looks back on the events. request: from the
    time of the event to find, as the published model does. A service knows that time: it is now (recommend.py --at
    now). last_event: from the time of the last event before it. either: in each epoch, a random half of the sequences
    trains in either way, so that the model may be asked with and without the time. Evaluation of request and either
    reports both: HR@10 with the time, and HR@10/last_event without it. It has no influence on actions, which are
    predicted at the time of their own event."""
    same_second_targets: bool = option(
        True, changes="reports", needs=having("task", "retrieval", why="ranking has no held-out items")
    )
    """Evaluate the held-out items whose time is the second of the event before them, too. No service is asked for such
    an item: its user is still in the request before. False leaves them out."""
    shuffle: bool = option(False, changes="training")
    """Shuffle the users again in each epoch."""
    shuffle_window_shards: int = option(
        0,
        changes="training",
        minimum=0,
        needs=having("shuffle", True, why="without it the order is that of the store", strict=True),
    )
    """Shuffle the shards of a store (preprocess_dataset.py --shards), then the samples of each window of this many
    shards: a process reads one window after another, and keeps the shards of two open. 0: shuffle all samples."""
    shuffle_ties: bool = option(
        False,
        changes="training",
        needs=having("task", "retrieval", why="ranking keeps the order in which the numbers of events were computed"),
    )
    """Training: shuffle the events of a user that have equal times again in each epoch, so that nothing is learnt from
    their order in the raw file. What is held out stays held out. Evaluation, and a phase of new events
    (TrainerArgs.continue_on), keep the order of the file. The data needs times."""
    split: str = option("auto", changes="training", choices=("auto", *dict.fromkeys(sum(SPLITS.values(), ()))))
    """How training and evaluation data are separated. auto: the split column of your own data, if it was preprocessed
    with --split; else leave_one_out for retrieval and user_holdout for ranking. time: train on the events before a cut
    in time, and evaluate on later ones, in retrieval on the first of each user, among all items. There, metrics of
    targets and of users that are in no history to train on (HR@10/new_items, HR@10/new_users) also stand apart. Users
    without an event before the cut cannot be asked. none: train on all events, and evaluate nothing but
    eval_dataset_path."""
    valid_items: int = option(
        1,
        changes="training",
        choices=(0, 1),
        needs=(
            having("task", "retrieval", why="ranking holds out whole users or a period of time"),
            not_having("split", "none", why="nothing is held out"),
        ),
    )
    """Items of each user before the test that are held out for validation: before the last one (leave_one_out), or
    before the cut (time), so that training still reaches up to the cut. 0: the published protocol, which trains on all
    items before the test and has no validation."""
    train_fraction: float = option(0.7, changes="training", above=0, below=1)
    """user_holdout: fraction of users to train on. time: fraction of events before the cut."""
    valid_fraction: float = option(
        0.0,
        changes="training",
        minimum=0,
        below=1,
        needs=(HOLDS_OUT_USERS, having("split", "auto", "user_holdout", why="it is a fraction of the users")),
    )
    """user_holdout: fraction of users to evaluate on during training and to choose the best model by (valid). The users
    beside these and train_fraction are evaluated on after the last iteration alone (test). 0: all users that are not
    trained on are valid, and there is no test."""
    eval_dataset_path: Optional[str] = option(
        None,
        changes="reports",
        needs=replace(HOLDS_OUT_USERS, strict=True),
        excludes={"valid_fraction": "all users of that data are evaluated on"},
    )
    """Ranking: a second preprocessed directory, all of which is used for evaluation."""
    item_feature_name: Optional[str] = option(None, changes="tensors")
    """Own data: the item feature. None: the item feature of the store."""
    contextual_feature_names: Optional[list[str]] = option(None, changes="tensors")
    """The contextual features to use, in this order. None: all contextual features of the store."""
    side_feature_names: list[str] = option([], changes="tensors")
    """The features of items (genres, author) and of events (device, hour) that are part of the item's token, beside its
    id. Of a feature with several values per item, the mean is taken. Numbers and vectors have no table: see
    NumericFeatureArgs. Data with times also has hour_of_day (24 values) and day_of_week (7), both UTC, and by powers of
    two time_gap (41: the time since the event before; of candidates, since the newest event of the history)."""
    known_after: list[str] = option([], changes="tensors")
    """Those of side_feature_names that are known only after the event, such as the time watched. They are part of the
    action's token and, like the action, are never shown to what predicts it."""

    @property
    def has_random_windows(self) -> bool:
        """Whether each epoch draws the window of a long history."""
        return self.window_stride == "random"

    @property
    def has_candidates(self) -> bool:
        """Whether candidates alone are labelled."""
        return super().has_candidates or self.candidates == "requests"


class NumericFeatureArgs(NamedFeaturesArgs):
    """How a model reads numbers (a price, the time watched) and vectors of DatasetArgs.side_feature_names.

    Preprocess them with --numbers and --vectors. A number without NumericFeatureArgs is standardized. The statistics
    are of the training data; for numbers of items, of all items. They are part of the model and of its checkpoints. A
    missing value is 0 after the transform, and a second input says that it is missing.
    """

    transform: str = option("standardize", changes="model", choices=("standardize", "log1p", "quantile", "none"))
    """standardize: subtract the mean and divide by the standard deviation, of each component of a vector. log1p: the
    same with sign(x) log(1 + |x|), for amounts that spread over orders of magnitude. quantile: the share of values
    below x, from -1 (the least) to 1 (the largest), by 65 quantiles. none: as it is. Vectors: standardize or none."""


# --- random data, generated in memory to measure speed --------------------------------------------------------------


class RandomDistribution(Args):
    """Random benchmark data: a distribution of lengths or ids. Draws are clipped to [low, high)."""

    dist_type: str = option("uniform", changes="training", choices=("uniform", "normal", "zipf", "lognormal"))
    """Kind of distribution."""
    low: int = option(0, changes="training", minimum=0)
    """Smallest value."""
    high: Optional[int] = option(None, changes="training", minimum=1)
    """Largest value plus one. None: the limit of the feature, which is the rows of its table or its longest
    sequence."""
    mean: Optional[float] = option(None, changes="training", needs=having("dist_type", "normal", "lognormal"))
    """Mean of a normal or lognormal distribution, for lognormal of the value itself. None: the middle of the
    range."""
    std: Optional[float] = option(None, changes="training", above=0, needs=having("dist_type", "normal", "lognormal"))
    """Standard deviation of a normal distribution (None: a quarter of the range), or of the logarithm of a lognormal
    one (None: 1)."""
    alpha: float = option(1.2, changes="training", above=0, needs=having("dist_type", "zipf"))
    """Exponent of a zipf distribution: the probability of low + k is proportional to 1 / (k + 1)^alpha."""


class FeatureArgs(NamedFeaturesArgs):
    """Random benchmark data: a group of features with equal lengths."""

    max_sequence_length: int = option(changes="tensors", minimum=1, maximum=10_000_000)
    """Length of the longest sequence; 1 for contextual features."""
    is_jagged: bool = option(False, changes="training")
    """True: lengths vary, see seqlen_dist. False: every sequence has max_sequence_length."""
    seqlen_dist: Optional[RandomDistribution] = option(
        None, changes="training", needs=having("is_jagged", True, why="all sequences are equally long")
    )
    """Distribution of the lengths if is_jagged. None: uniform on [1, max_sequence_length]."""
    value_dists: Optional[list[RandomDistribution] | dict[str, RandomDistribution]] = option(None, changes="training")
    """Distributions of the ids: a dict from feature to distribution, or a list with one per feature in the order of
    feature_names. A feature without one, and None: uniform over the rows of the table."""

    def distributions(self) -> dict[str, RandomDistribution]:
        """Feature → distribution of its ids, for features in value_dists."""
        given = self.value_dists or {}
        return given if isinstance(given, dict) else dict(zip(self.feature_names, given, strict=False))


class BenchmarkDatasetArgs(AnyDatasetArgs):
    """Random data generated in memory, to measure speed; replaces DatasetArgs."""

    feature_args: list[FeatureArgs] = option(changes="tensors", not_empty=True)
    """The groups of features."""
    embedding_args: list[EmbeddingArgs] = option(changes="tensors", not_empty=True)
    """The tables."""
    item_feature_name: str = option(changes="tensors", not_empty=True)
    """The item feature."""
    contextual_feature_names: list[str] = option(changes="tensors")
    """The features that are context tokens, in this order; may be empty."""
    num_generated_batches: int = option(100, changes="training", minimum=1, maximum=1_000_000)
    """Number of different batches; they are generated once and then repeated."""

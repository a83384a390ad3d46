"""The tables of the quality campaign, which scripts/quality/run.py runs: what their rows train, and how they choose.

To add a recipe, write its gin file into configs/ and name it in a table or a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from hstu.base.errors import ConfigError
from hstu.config.args import Task
from hstu.config.problems import did_you_mean
from scripts.quality.ratings import PARTS

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: a configuration that is trained, or a peer.

    In bindings and commands, $seed, $store (the preprocessed data) and $folder (the row's own, for one seed) stand for
    what they are in a run.
    """

    name: str
    config: str | None = None
    """Gin file. None: that of the table."""
    bindings: tuple[str, ...] = ()
    """Changes of the gin file; they win over those of the table."""
    prepare: tuple[tuple[str, ...], ...] = ()
    """Commands before the training, such as one that writes features: a script and its arguments. (): those of the
    row that ``epochs_of`` names, or those of the table if the row has the table's gin file."""
    epochs_of: str | None = None
    """Train as this row of the table does, on its validation part, too, for as many epochs as it needed to its best
    validation. The row's own bindings come on top."""
    peer: tuple[str, ...] = ()
    """Instead of a training: a script and its arguments. It writes {"metrics": {name: value}} to $folder/peer.json, and
    for retrieval it may write $folder/per_user.csv, with columns user and rank."""
    trials: int | str = ""
    """Number of settings that validation compared to choose those of the row, where they were counted."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that are compared on the same data by the same metrics."""

    title: str
    task: Task
    dataset: str
    """Name of a built-in dataset."""
    config: str
    """Gin file of the rows that have none of their own."""
    metrics: tuple[str, ...]
    """Columns. The best value of the first one on validation chooses the checkpoint."""
    rows: tuple[Row, ...]
    reference: str
    """The row that the others are compared with, seed by seed."""
    bindings: tuple[str, ...] = ()
    """For all rows."""
    prepare: tuple[tuple[str, ...], ...] = ()
    """Commands before the training of rows with the table's gin file."""
    validation: tuple[str, ...]
    """Bindings that hold out a validation part."""
    whole: tuple[str, ...] = ()
    """Bindings that train on the validation part, too, for rows with ``epochs_of``."""
    published: tuple[tuple[str, float, float], ...] = ()
    """Figures of papers on the same data: whose, and the values of the first two metrics."""

    @property
    def metric(self) -> str:
        """The metric that chooses."""
        return self.metrics[0]

    def row(self, name: str) -> Row:
        """The row of this name. Raises ConfigError if there is none."""
        return find("row", name, {row.name: row for row in self.rows})

    def config_of(self, row: Row) -> str:
        """The gin file of a row."""
        inherited = self.config_of(self.row(row.epochs_of)) if row.epochs_of else self.config
        return row.config or inherited

    def bindings_of(self, row: Row) -> tuple[str, ...]:
        """All bindings of a row on top of its gin file."""
        if row.epochs_of:
            return (*self.bindings_of(self.row(row.epochs_of)), *self.whole, *row.bindings)
        return (*self.bindings, *self.validation, *row.bindings)

    def prepare_of(self, row: Row) -> tuple[tuple[str, ...], ...]:
        """The commands before the training of a row."""
        if row.prepare:
            return row.prepare
        if row.epochs_of:
            return self.prepare_of(self.row(row.epochs_of))
        return () if row.config else self.prepare

    def chooses(self, row: Row) -> bool:
        """Whether validation chooses the checkpoint of a row."""
        return row.epochs_of is None and not row.peer


def find(kind: str, name: str, known: Mapping[str, T]) -> T:
    """The one of this name. Raises ConfigError with those that there are."""
    if name not in known:
        raise ConfigError(f"there is no {kind} {name!r}{did_you_mean(name, known)}; choose from: {', '.join(known)}")
    return known[name]


def without_each(undone: Mapping[str, Sequence[str]], trials: int | str = "") -> tuple[Row, ...]:
    """The row "all", which is the gin file of the table, and for each part of its recipe the file without it.

    ``undone``: part → the bindings that take it away. ``trials``: of the recipe.
    """
    parts = (Row(name=f"without {part}", bindings=tuple(undo)) for part, undo in undone.items())
    return (Row(name="all", trials=trials), *parts)


_RETRIEVAL = {
    "mask_seen": ("RetrievalArgs.mask_seen = False",),
    "all items as negatives": ('RetrievalArgs.negatives = "uniform"', "RetrievalArgs.num_negatives = 128"),
    "small batches and a schedule": (
        "TrainerArgs.train_batch_size = 128",
        "TrainerArgs.eval_interval = 94",
        "OptimizerArgs.learning_rate = 1e-3",
        'LRScheduleArgs.schedule = "constant"',
        "LRScheduleArgs.warmup_ratio = None",
    ),
    "genres and year": ("DatasetArgs.side_feature_names = []", "RetrievalArgs.item_tower = False"),
    "item tower": ("RetrievalArgs.item_tower = False",),
    "ratings": ('DatasetArgs.action_feature_name = ""', "NetworkArgs.interleave_actions = True"),
    "random windows": ("DatasetArgs.window_stride = None",),
    "four layers": ("NetworkArgs.num_layers = 2",),
    "the time of the request": ('DatasetArgs.query_time = "last_event"',),
    "the time of the request in half of the sequences": ('DatasetArgs.query_time = "either"',),
    "learned positions": ('NetworkArgs.position_encoding = "relative_bias"',),
}
_ONLY_ML_1M = "learned positions", "random windows"
"""Parts that the recipe of ML-100K does not have."""
_ONLY_ML_100K = "small batches and a schedule", "genres and year", "four layers"
"""Parts that the table of ML-1M does not take away."""
_ESASREC = "in arXiv 2508.06450"
_BEAUTY = (
    ("SASRec (in arXiv 2305.05065)", 0.0318, 0.0605),
    ("S3-Rec, with attributes (in arXiv 2305.05065)", 0.0327, 0.0647),
    ("TIGER (arXiv 2305.05065)", 0.0384, 0.0648),
    ("ActionPiece (arXiv 2502.13581)", 0.0424, 0.0775),
    ("DuoRec (arXiv 2110.05730)", 0.0443, 0.0845),
    (f"HSTU ({_ESASREC})", 0.0439, 0.0788),
    (f"FuXi-α ({_ESASREC})", 0.0451, 0.0809),
    (f"SASRec with sampled softmax ({_ESASREC})", 0.0531, 0.0921),
    (f"eSASRec ({_ESASREC})", 0.0523, 0.0928),
)
_TOYS = (
    ("TIGER (arXiv 2305.05065)", 0.0432, 0.0712),
    (f"HSTU ({_ESASREC})", 0.0450, 0.0778),
    (f"SASRec with sampled softmax ({_ESASREC})", 0.0580, 0.0970),
    (f"eSASRec ({_ESASREC})", 0.0538, 0.0939),
)
"""Figures of papers: whose, NDCG@10 and HR@10."""
_RETRIEVAL_PEERS = tuple(
    Row(
        name=name, trials=1 if name == "popularity" else 4,
        peer=(
            "scripts/quality/retrieval_peers.py", "--store", "$store", "--peers", name, "--seed", "$seed",
            "--output", "$folder/peer.json", "--per_user", "$folder/per_user.csv",
        ),
    )
    for name in (
        "popularity", "item_knn", "item_knn_recent", "ease", "ease_recent", "gru4rec", "bert4rec", "sasrec", "esasrec",
    )
)  # fmt: skip
_NO_NUMBERS = (
    "TrainerArgs.train_batch_size = 8",
    "TrainerArgs.eval_interval = 100",
    "DatasetArgs.window_stride = 200",
    "NetworkArgs.num_layers = 2",
    "NetworkArgs.num_attention_heads = 2",
    "NetworkArgs.hidden_dropout = 0.3",
    "NetworkArgs.input_dropout = 0.0",
    "NetworkArgs.item_embedding_dim = 16",
    "OptimizerArgs.learning_rate = 1.5e-3",
    "OptimizerArgs.ema_decay = 0.995",
)
"""The recipe without its numbers, on top of the gin file of ids and ratings."""
_RANKS = (
    "item_popularity", "user_count", "hour", "gap", "days_since_first", "in_session", "in_second", "year_number",
    "year_count", "genres_count",
)  # fmt: skip
_AMOUNTS = (
    "item_mean", "item_std", *(f"item_share_{stars}" for stars in range(1, 6)),
    "user_mean", "user_offset", "user_std", "user_choice", *(f"user_share_{stars}" for stars in range(1, 6)),
    *(f"last_{what}_{back}" for back in (1, 2, 3) for what in ("rating", "above")),
    "recent_offset_0.7", "recent_offset_0.9", "recent_offset_0.97", "baseline", "recent_baseline",
    "weekday", "year_offset", "genres_offset", "genres_least", "genres_most",
)  # fmt: skip
_NO_FACTORS = (
    f"DatasetArgs.side_feature_names = {['genres', *_RANKS, *_AMOUNTS]}",
    f"ranks/NumericFeatureArgs.feature_names = {[*_RANKS]}",
    f"amounts/NumericFeatureArgs.feature_names = {[*_AMOUNTS]}",
)
_EVENTS_ALONE = "DatasetArgs.dataset_path = '$store'"
_RANKING_VALIDATION = ("DatasetArgs.train_fraction = 0.6", "DatasetArgs.valid_fraction = 0.1")


def _retrieval(title: str, dataset: str, config: str, rows: tuple[Row, ...], epochs: int) -> Table:
    return Table(
        title=title, task="retrieval", dataset=dataset, config=config, rows=rows, reference="all",
        metrics=("NDCG@10", "HR@10", "HR@50", "MRR", "NDCG@10/last_event", "HR@10/last_event"),
        bindings=(
            'RetrievalArgs.eval_metrics = ("NDCG@10", "HR@10", "HR@50", "MRR")',
            f"TrainerArgs.num_train_epochs = {epochs}.0",
        ),
        validation=("DatasetArgs.valid_items = 1",),
        whole=("DatasetArgs.valid_items = 0",),
    )  # fmt: skip


def _later(table: Table) -> Table:
    """Train before a moment T, evaluate after it: the recipe, and what it reads of times."""
    rows = (row for row in table.rows if row.name == "all" or "time" in row.name)
    return replace(
        table, title=f"{table.title}, cut in time", rows=tuple(rows),
        metrics=("NDCG@10", "HR@10", "NDCG@10/last_event", "HR@10/last_event", "HR@10/new_users", "HR@10/new_items"),
        bindings=(*table.bindings, 'DatasetArgs.split = "time"', "DatasetArgs.train_fraction = 0.8"),
    )  # fmt: skip


def _amazon(title: str, dataset: str, published: tuple[tuple[str, float, float], ...]) -> Table:
    """Data in the order of time, without times."""
    attributes = 'DatasetArgs.side_feature_names = ["attributes"]', "RetrievalArgs.item_tower = True"
    return Table(
        title=title, task="retrieval", dataset=dataset, config=f"configs/{dataset.replace('-', '_')}_retrieval.gin",
        metrics=("NDCG@10", "HR@10", "MRR"), reference="ids alone", published=published,
        rows=(Row(name="ids alone"), Row(name="with attributes", bindings=attributes), *_RETRIEVAL_PEERS),
        validation=("DatasetArgs.valid_items = 1",),
    )  # fmt: skip


def _numbers(train_fraction: float) -> tuple[tuple[str, ...], ...]:
    """What makes the data of a row with numbers."""
    return (
        (
            "scripts/quality/causal_features.py", "--store", "$store", "--seed", "$seed",
            "--train_fraction", str(train_fraction), "--output", "$folder/numbers", "--force",
        ),
    )  # fmt: skip


def _ranking(title: str, dataset: str, epochs: int, undone: Mapping[str, Sequence[str]]) -> Table:
    """``epochs``: of the rows without numbers."""
    name = dataset.replace("-", "_")
    plain, recipe = f"configs/{name}_ranking.gin", (*_NO_NUMBERS, f"TrainerArgs.num_train_epochs = {epochs}.0")

    return Table(
        title=title, task="ranking", dataset=dataset, config=f"configs/{name}_ranking_numbers.gin", reference="all",
        rows=(
            *without_each(undone),
            Row(name="all, trained on validation users, too", epochs_of="all", prepare=_numbers(0.7)),
            Row(name="no numbers, usual settings", config=plain, bindings=(_EVENTS_ALONE,)),
            Row(name="no numbers", config=plain, bindings=(_EVENTS_ALONE, *recipe)),
        ),
        metrics=("AUC>=4", "LOGLOSS", *(f"AUC>=4, {part}" for part in PARTS)),
        bindings=(
            'RankingArgs.eval_metrics = ("AUC>=4", "LOGLOSS", "ACC")',
            "DatasetArgs.dataset_path = '$folder/numbers'",
        ),
        validation=_RANKING_VALIDATION,  # the usual 30 % are test
        whole=("DatasetArgs.train_fraction = 0.7", "DatasetArgs.valid_fraction = 0.0"),
        prepare=_numbers(0.6),
    )  # fmt: skip


_ML_1M = _retrieval(
    "Next film, MovieLens-1M", "ml-1m", "configs/ml_1m_retrieval_best.gin",
    (
        *without_each({part: undo for part, undo in _RETRIEVAL.items() if part not in _ONLY_ML_100K}),
        *_RETRIEVAL_PEERS,
    ), epochs=40,
)  # fmt: skip
_ML_100K = _retrieval(
    "Next film, MovieLens-100K", "ml-100k", "configs/ml_100k_retrieval.gin",
    (
        *without_each({part: undo for part, undo in _RETRIEVAL.items() if part not in _ONLY_ML_1M}, "14 or more"),
        Row(name="with random windows", bindings=('DatasetArgs.window_stride = "random"',)),
        Row(name="all, trained on validation items, too", epochs_of="all"),
        *_RETRIEVAL_PEERS,
    ), epochs=24,
)  # fmt: skip
TABLES: Mapping[str, Table] = {
    "ml_1m_retrieval": _ML_1M,
    "ml_1m_retrieval_time": _later(_ML_1M),
    "ml_100k_retrieval": _ML_100K,
    "ml_100k_retrieval_time": _later(_ML_100K),
    "amazon_beauty_retrieval": _amazon("Next product, Amazon Beauty", "amazon-beauty", _BEAUTY),
    "amazon_toys_retrieval": _amazon("Next product, Amazon Toys", "amazon-toys", _TOYS),
    "ml_1m_ranking": _ranking(
        "Ratings, MovieLens-1M", "ml-1m", epochs=3,
        undone={
            "numbers of factors and neighbours": _NO_FACTORS,
            "windows": ("DatasetArgs.window_stride = None",),
            "moving average": ("OptimizerArgs.ema_decay = 0.0",),
        },
    ),
    "ml_100k_ranking": _ranking(
        "Ratings, MovieLens-100K", "ml-100k", epochs=3,
        undone={
            "numbers of factors and neighbours": _NO_FACTORS,
            "a slow item table": ("OptimizerArgs.sparse_learning_rate = 3e-3",),
            "windows": ("DatasetArgs.window_stride = None",),
            "moving average": ("OptimizerArgs.ema_decay = 0.0",),
        },
    ),
}  # fmt: skip

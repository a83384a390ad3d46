"""The tables of the quality campaign, which scripts/quality/run.py runs: what their rows train, and how they choose.

To add a recipe, write its gin file into configs/ and name it in a table or a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hstu.config.args import Task
from hstu.config.args.task import LOWER_IS_BETTER
from hstu.config.errors import ConfigError
from hstu.config.problems import did_you_mean

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
    """Commands before the training, such as one that writes initial rows: a script and its arguments."""
    epochs_of: str | None = None
    """Train as this row of the table does, on its validation part, too, for as many epochs as it needed to its best
    validation. The row's own bindings come on top."""
    peer: tuple[str, ...] = ()
    """Instead of a training: a script and its arguments. It writes {"metrics": {name: value}} to $folder/peer.json."""


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
    """Columns. The first one chooses the checkpoint on validation."""
    rows: tuple[Row, ...]
    reference: str
    """The row that the others are compared with, seed by seed."""
    bindings: tuple[str, ...] = ()
    """For all rows."""
    validation: tuple[str, ...] = ()
    """Bindings that hold out a validation part. (): the data has none, and all rows train as long as they say."""
    whole: tuple[str, ...] = ()
    """Bindings that train on the validation part, too, for rows with ``epochs_of``."""

    @property
    def metric(self) -> str:
        """The metric that chooses."""
        return self.metrics[0]

    @property
    def mode(self) -> str:
        """Whether the "max" or the "min" of ``metric`` is best."""
        return "min" if self.metric.split("/")[0] in LOWER_IS_BETTER else "max"

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
        """All commands before the training of a row."""
        return (*(self.prepare_of(self.row(row.epochs_of)) if row.epochs_of else ()), *row.prepare)

    def chooses(self, row: Row) -> bool:
        """Whether validation chooses the checkpoint of a row."""
        return bool(self.validation) and row.epochs_of is None and not row.peer


def find(kind: str, name: str, known: Mapping[str, T]) -> T:
    """The one of this name. Raises ConfigError with those that there are."""
    if name not in known:
        raise ConfigError(f"there is no {kind} {name!r}{did_you_mean(name, known)}; choose from: {', '.join(known)}")
    return known[name]


def ablation(base: str, levers: Mapping[str, Sequence[str]]) -> tuple[Row, ...]:
    """The row ``base``, the one with all levers, "all", and for each lever all others, "without <lever>"."""

    def row(name: str, used: Sequence[str]) -> Row:
        return Row(name=name, bindings=tuple(binding for lever in used for binding in levers[lever]))

    without = (row(f"without {left_out}", [name for name in levers if name != left_out]) for left_out in levers)
    return (row(base, ()), row("all", tuple(levers)), *without)


def without_each(undone: Mapping[str, Sequence[str]]) -> tuple[Row, ...]:
    """The row "all", which is the gin file of the table, and for each part of its recipe the file without it.

    ``undone``: part → the bindings that take it away.
    """
    return (Row(name="all"), *(Row(name=f"without {part}", bindings=tuple(undo)) for part, undo in undone.items()))


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
    "random windows": ("DatasetArgs.random_windows = False",),
    "four layers": ("NetworkArgs.num_layers = 2",),
    "the time of the request": ('DatasetArgs.query_time = "last_event"',),
    "learned positions": ('NetworkArgs.position_encoding = "relative_bias"',),
}
_RETRIEVAL_PEERS = tuple(
    Row(
        name=name,
        peer=(
            "scripts/quality/retrieval_peers.py", "--store", "$store", "--output", "$folder", "--seeds", "$seed",
            "--peers", name,
        ),
    )
    for name in ("popularity", "item_knn_recent", "ease_recent", "gru4rec", "sasrec_published", "sasrec_unseen")
)  # fmt: skip
_RANKING = {
    "item × action": ("NetworkArgs.action_item_product = True",),
    "batches of 8": ("TrainerArgs.train_batch_size = 8", "OptimizerArgs.learning_rate = 1.5e-3"),
    "windows": ("DatasetArgs.window_stride = 200",),
    "moving average": ("OptimizerArgs.ema_decay = 0.995",),
    "items of width 16": ("NetworkArgs.item_embedding_dim = 16",),
}


def _retrieval(title: str, dataset: str, config: str, rows: tuple[Row, ...], epochs: int) -> Table:
    return Table(
        title=title, task="retrieval", dataset=dataset, config=config, rows=rows, reference="all",
        metrics=("NDCG@10", "HR@10", "HR@50", "MRR"),
        bindings=(
            'RetrievalArgs.eval_metrics = ("NDCG@10", "HR@10", "HR@50", "MRR")',
            f"TrainerArgs.num_train_epochs = {epochs}.0",
        ),
        validation=("DatasetArgs.valid_items = 1",),
        whole=("DatasetArgs.valid_items = 0",),
    )  # fmt: skip


def _ranking(title: str, dataset: str, config: str, epochs: int) -> Table:
    return Table(
        title=title, task="ranking", dataset=dataset, config=config, reference="all",
        rows=(*ablation("the gin file", _RANKING), Row(name="all, trained on validation users, too", epochs_of="all")),
        metrics=("AUC>=4", "LOGLOSS", "ACC"),
        bindings=(
            'RankingArgs.eval_metrics = ("AUC>=4", "LOGLOSS", "ACC")',
            f"TrainerArgs.num_train_epochs = {epochs}.0",
        ),
        validation=("DatasetArgs.train_fraction = 0.6", "DatasetArgs.valid_fraction = 0.1"),  # the usual 30 % are test
        whole=("DatasetArgs.train_fraction = 0.7", "DatasetArgs.valid_fraction = 0.0"),
    )  # fmt: skip


TABLES: Mapping[str, Table] = {
    "ml_1m_retrieval": _retrieval(
        "Next film, MovieLens-1M", "ml-1m", "configs/ml_1m_retrieval_best.gin",
        (
            *without_each(_RETRIEVAL),
            Row(name="all, trained on validation items, too", epochs_of="all"),
            Row(
                name="published settings", config="configs/ml_1m_retrieval.gin",
                bindings=("TrainerArgs.num_train_epochs = 101.0",),
            ),
            *_RETRIEVAL_PEERS,
        ), epochs=40,
    ),
    "ml_100k_retrieval": _retrieval(
        "Next film, MovieLens-100K", "ml-100k", "configs/ml_100k_retrieval_best.gin",
        (
            *without_each(_RETRIEVAL),
            Row(name="all, trained on validation items, too", epochs_of="all"),
            *_RETRIEVAL_PEERS,
        ), epochs=40,
    ),
    "ml_1m_ranking": _ranking("Ratings, MovieLens-1M", "ml-1m", "configs/ml_1m_ranking.gin", epochs=4),
    "ml_100k_ranking": _ranking("Ratings, MovieLens-100K", "ml-100k", "configs/ml_100k_ranking.gin", epochs=10),
}  # fmt: skip
